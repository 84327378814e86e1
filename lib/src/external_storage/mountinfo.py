"""What is mounted where: ``/proc/<pid>/mountinfo``, read exactly (proc_pid_mountinfo(5)).

A path says little about a mount: it may be mounted over, or be another one a moment later. What a
descriptor is on is sure: ``of_descriptor`` goes by the kernel's mount id, which stays the same as
long as the descriptor is open.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from external_storage.logs import get_logger

log = get_logger(__name__)

_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")
_FIXED_FIELDS = 6  # before the optional ones
_SEPARATOR = b"-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One line of mountinfo, escapes decoded.

    Bytes that are not UTF-8 are in the texts as ``os.fsdecode`` leaves them.
    """

    mount_id: int
    parent_id: int
    """The mount this one is mounted on; of the topmost it is a mount outside of the table."""
    major: int
    minor: int
    root: str
    """Which directory of the file system is mounted: ``/``, or another one for a bind mount."""
    mount_point: str
    options: tuple[str, ...]
    """Those of this mount (``ro``, ``nosuid``); another mount of the file system may differ."""
    optional_fields: tuple[str, ...]
    """Propagation: ``shared:1``, ``master:2`` and the like."""
    fs_type: str
    source: str
    """A device, ``server:/path``, or whatever the file system was given; may be empty."""
    super_options: tuple[str, ...]
    """Those of the file system, for all of its mounts."""

    @property
    def device(self) -> int:
        """As ``st_dev`` has it, where the file system has but one (not btrfs)."""
        return os.makedev(self.major, self.minor)

    @property
    def read_only(self) -> bool:
        return "ro" in self.options or "ro" in self.super_options


def read(pid: int | str = "self") -> list[Mount]:
    """The mounts that process ``pid`` sees, in the kernel's order. Raises OSError.

    A line that cannot be understood is logged and left out.
    """
    mounts = []
    for line in Path(f"/proc/{pid}/mountinfo").read_bytes().split(b"\n"):
        if not line:
            continue
        try:
            mounts.append(parse_line(line))
        except ValueError as error:
            log.warning("a line of mountinfo is left out", line=os.fsdecode(line), error=error)
    return mounts


def parse_line(line: bytes) -> Mount:
    """One line without its end. ValueError says what is wrong with it."""
    # By single spaces: the kernel escapes the ones within a field, and a source can be empty.
    fields = line.split(b" ")
    try:
        end = fields.index(_SEPARATOR, _FIXED_FIELDS)
    except ValueError:
        raise ValueError("no separator after the optional fields") from None
    # Some file systems print super options with bare spaces in them: the rest is all theirs.
    tail = line.split(b" ", end + 3)[end + 1 :]
    if len(tail) != 3:
        raise ValueError("want type, source and options after the separator")
    major, colon, minor = fields[2].partition(b":")
    if not colon:
        raise ValueError("the third field is not major:minor")
    return Mount(
        mount_id=_number(fields[0]),
        parent_id=_number(fields[1]),
        major=_number(major),
        minor=_number(minor),
        root=_text(fields[3]),
        mount_point=_text(fields[4]),
        options=_options(fields[5]),
        optional_fields=tuple(_text(field) for field in fields[_FIXED_FIELDS:end]),
        fs_type=_text(tail[0]),
        source=_text(tail[1]),
        super_options=_options(tail[2]),
    )


def mount_id(descriptor: int) -> int:
    """The id of the mount an open descriptor is on.

    Raises OSError: EBADF for one that is not open, ENOTSUP where there is no ``/proc``.
    """
    os.fstat(descriptor)
    try:
        facts = Path(f"/proc/self/fdinfo/{descriptor}").read_bytes()
    except FileNotFoundError:
        # Not as it comes: callers take a missing file for one of theirs.
        raise OSError(errno.ENOTSUP, "mount ids need /proc to be mounted") from None
    found = re.search(rb"^mnt_id:\s*(\d+)$", facts, re.MULTILINE)
    if found is None:
        raise OSError(errno.ENOTSUP, "the kernel tells no mount id of a descriptor")
    return int(found[1])


def of_descriptor(descriptor: int) -> Mount:
    """The mount an open descriptor is on, whatever its path has become.

    Raises LookupError if that mount is in no path of ours any more (unmounted lazily, or of
    another mount namespace) or its line is not understood, OSError as ``mount_id``.
    """
    wanted = mount_id(descriptor)
    # Only its own line is parsed: a node has thousands, and some ask before every operation.
    begin = b"%d " % wanted
    for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n"):
        if line.startswith(begin):
            try:
                return parse_line(line)
            except ValueError as error:
                raise LookupError(
                    f"the line of mount {wanted} is not understood: {error}"
                ) from error
    raise LookupError(f"mount {wanted} is not mounted anywhere we see")


def find(path: str | Path, *, mounts: list[Mount] | None = None) -> Mount:
    """The mount that ``path`` is on, by its text alone.

    The path itself is not touched, so a dead server cannot make this hang; in return it must be
    absolute and without links or ``..``. Mounts that are mounted over are not found. ``mounts`` is
    a table read before. Raises ValueError for a path of another shape, LookupError, OSError.
    """
    text = os.fspath(path)
    if not text.startswith("/") or ".." in text.split("/"):
        raise ValueError(f"{text!r} is not an absolute path without '..'")
    text = os.path.normpath("/" + text.lstrip("/"))
    table = read() if mounts is None else mounts
    known = {mount.mount_id for mount in table}
    tops = [m for m in table if m.parent_id == m.mount_id or m.parent_id not in known]
    current = next((mount for mount in tops if mount.mount_point == "/"), None)
    if current is None:
        raise LookupError("the root directory is not in the table of mounts")
    # As the kernel walks: at each mount on to the one that is next on the way. The longest match
    # in the whole table would also find what lies hidden below another mount.
    while True:
        on_the_way = [
            mount
            for mount in table
            if mount.parent_id == current.mount_id
            and mount.mount_id != current.mount_id
            and _is_within(text, mount.mount_point)
        ]
        if not on_the_way:
            return current
        current = min(on_the_way, key=lambda mount: len(mount.mount_point))


def _is_within(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _number(field: bytes) -> int:
    if not re.fullmatch(rb"[0-9]+", field):
        raise ValueError(f"{os.fsdecode(field)!r} is not a number")
    return int(field)


def _text(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda found: bytes([int(found[1], 8)]), field))


def _options(field: bytes) -> tuple[str, ...]:
    # Split before decoding: a comma that was escaped is part of a value.
    return tuple(_text(option) for option in field.split(b",") if option)
