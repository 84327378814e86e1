"""The ways to clean a block device, and what each leaves behind."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

MAX_PASSES = 35
MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "discard"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
}
"""What ``reformat`` runs, by fsType; both discard what the device can discard."""


class MethodKind(StrEnum):
    """How a device is cleaned."""

    ZERO = "zero"
    DISCARD = "discard"
    SIGNATURES = "signatures"
    OVERWRITE = "overwrite"
    REFORMAT = "reformat"
    COMMAND = "command"


_LEAVES = {
    MethodKind.ZERO: "old data is unreadable: every block reads as zeroes",
    MethodKind.DISCARD: "old data MAY BE READABLE: what discarded blocks read as is the disk's own",
    MethodKind.SIGNATURES: "old data STAYS READABLE: only signatures and partition tables go",
    MethodKind.OVERWRITE: "old data is unreadable: every block is overwritten",
    MethodKind.REFORMAT: "old data MAY BE READABLE: a new file system; discards where it can",
    MethodKind.COMMAND: "what becomes of old data is the command's affair",
}
# What the reference's image has, so that a configuration written for it goes on to work.
_SCRIPTS = {
    "quick_reset.sh": MethodKind.SIGNATURES,
    "blkdiscard.sh": MethodKind.DISCARD,
    "dd_zero.sh": MethodKind.OVERWRITE,
    "shred.sh": MethodKind.OVERWRITE,
}


@dataclass(frozen=True, slots=True)
class Method:
    """One way to clean a device."""

    kind: MethodKind
    passes: int = 1
    """Of ``overwrite``: all but the last write random data, the last one zeroes."""
    command: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, command: tuple[str, ...] = (), *, fs_type: str = "") -> Method:
        """From ``cleanMethod``: a kind, or ``overwrite:3``. Raises ValueError."""
        name, colon, count = text.partition(":")
        if name not in tuple(MethodKind) or (colon and name != MethodKind.OVERWRITE):
            raise ValueError(f"{text!r} is not one of: {', '.join(MethodKind)}, overwrite:N")
        kind = MethodKind(name)
        if kind is MethodKind.COMMAND and not command:
            raise ValueError("'command' needs blockCleanerCommand")
        if kind is MethodKind.REFORMAT and (fs_type or "ext4") not in MKFS:
            raise ValueError(f"'reformat' makes {', '.join(MKFS)}, not fsType {fs_type!r}")
        passes = _count(count) if colon else 1
        return cls(kind, passes, command if kind is MethodKind.COMMAND else ())

    @classmethod
    def of_command(cls, command: tuple[str, ...]) -> Method:
        """From ``blockCleanerCommand``: the reference's own scripts are built in."""
        found = re.fullmatch(r"/scripts/([a-z_]+\.sh)", command[0])
        kind = _SCRIPTS.get(found[1]) if found else None
        if kind is None:
            return cls(MethodKind.COMMAND, 1, command)
        if kind is not MethodKind.OVERWRITE:
            return cls(kind)
        # shred writes its passes of random data and then one of zeroes.
        shred = command[0].endswith("shred.sh")
        default = "3" if shred else "1"
        return cls(kind, _count(command[1] if len(command) > 1 else default) + shred)

    @property
    def leaves(self) -> str:
        """Whether old data can be read afterwards."""
        return _LEAVES[self.kind]

    @property
    def in_place(self) -> bool:
        """Done by ourselves through the one descriptor that was checked."""
        return self.kind not in (MethodKind.REFORMAT, MethodKind.COMMAND)

    def __str__(self) -> str:
        if self.kind is MethodKind.OVERWRITE:
            return f"overwrite:{self.passes}"
        return " ".join((self.kind.value, *self.command))


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= MAX_PASSES:
        raise ValueError(f"{text!r} is not a number of passes from 1 to {MAX_PASSES}")
    return int(text)
