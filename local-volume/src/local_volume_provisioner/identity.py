"""Which disk or file system a volume is, in three ranks, and whether two are the same.

- *hardware*: what the disk says of itself (wwn, serial, the UUID of an LVM volume). Follows it
  everywhere. Of a partition: those of its disk, with where the partition lies.
- *placement*: the partition's UUID and the size. Says that it may well be the same.
- *boot-local*: the device number and the disk's sequence number. Sure within one boot, and without
  any meaning beyond it.

The UUID of a file system is *content*. It counts for volumes found as a mounted file system; in a
block device it is the user's data, and theirs to change.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path

import msgspec

from external_storage.mountinfo import Mount
from local_volume_provisioner.devices import Device

_MEMORY = frozenset({"tmpfs", "ramfs"})


class Identity(msgspec.Struct, rename="camel", omit_defaults=True, frozen=True):
    """What is written down on a volume and in the ledger."""

    kind: str
    """``device`` or ``mount``."""
    hardware: dict[str, str] = {}
    part: str = ""
    """Of a partition: its number and where it begins."""
    partition_uuid: str = ""
    size: int = 0
    """Bytes of a device; 0 for a mount."""
    boot_id: str = ""
    device: str = ""
    """``major:minor``."""
    disk_sequence: str = ""
    file_system: str = ""
    """UUID of a mounted file system."""
    fs_type: str = ""
    root: str = ""
    """Which directory of its file system a mount shows."""
    source: str = ""
    """What a mount without a device is of: ``server:/path``."""


class Verdict(StrEnum):
    """Whether what is there is what was written down."""

    SAME = "same"
    """By hardware, or by what is as good for a mount."""
    LIKELY = "likely"
    """By placement only: for classes with ``identity: placement``."""
    UNKNOWN = "unknown"
    DIFFERENT = "different"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A verdict and what it rests on."""

    verdict: Verdict
    why: str


@cache
def boot_id() -> str:
    """Of this boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def of_device(device: Device) -> Identity:
    return Identity(
        kind="device",
        hardware=device.hardware,
        part=f"{device.partition}@{device.start}" if device.partition else "",
        partition_uuid=device.partition_uuid,
        size=device.size,
        boot_id=boot_id(),
        device=device.major_minor,
        disk_sequence=device.disk_sequence,
    )


def of_mount(mount: Mount, uuid: str, device: Device | None) -> Identity:
    """``device``: what the file system is on, if that is one block device."""
    return Identity(
        kind="mount",
        hardware=device.hardware if device is not None else {},
        part=f"{device.partition}@{device.start}"
        if device is not None and device.partition
        else "",
        boot_id=boot_id(),
        # Not always the mount's own: btrfs has another number with each mount.
        device=device.major_minor if device is not None else f"{mount.major}:{mount.minor}",
        disk_sequence=device.disk_sequence if device is not None else "",
        # In memory it is another one with each mount: it says less than the device number.
        file_system="" if mount.fs_type in _MEMORY else uuid,
        fs_type=mount.fs_type,
        root=mount.root,
        source=mount.source if device is None else "",
    )


def encode(identity: Identity) -> str:
    """As it stands in an annotation."""
    return msgspec.json.encode(identity).decode()


_decoder = msgspec.json.Decoder(Identity)


def decode(text: str) -> Identity | None:
    """None for what is none: an annotation can be anything."""
    try:
        return _decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def digest(identity: Identity) -> str:
    """Tells it from any other, in few characters."""
    return hashlib.sha256(encode(identity).encode()).hexdigest()[:16]


def is_same_disk(recorded: Identity, current: Identity) -> bool:
    """Whether ``current`` holds the data of what was ``recorded``, beyond doubt and under whatever
    name: a mount, and the device that it is a mount of, too."""
    in_this_boot = recorded.boot_id == current.boot_id
    if recorded.kind != current.kind:
        same = in_this_boot and _boot_local(recorded) == _boot_local(current)
        return recorded.part == current.part and (same or _hardware(recorded, current) is True)
    if recorded.fs_type in _MEMORY:
        return False  # nothing tells two of them apart but when they were mounted
    verdict = compare(recorded, current).verdict
    return verdict is Verdict.SAME or (verdict is Verdict.LIKELY and in_this_boot)


def marks(identity: Identity) -> set[str]:
    """Two that are the same disk have one of these in common: for who looks among many."""
    found = {f"{kind} {value}" for kind, value in identity.hardware.items()}
    found |= {text for text in (identity.file_system, identity.source) if text}
    return found | {f"{identity.boot_id} {_boot_local(identity)}"}


def refreshed(recorded: Identity, current: Identity) -> Identity:
    """What is written down from now on, ``current`` having been found to be what was recorded: it
    has the size and the boot-local ids of today, and keeps what cannot be read today."""
    return msgspec.structs.replace(
        current,
        hardware={**recorded.hardware, **current.hardware},
        partition_uuid=current.partition_uuid or recorded.partition_uuid,
        file_system=current.file_system or recorded.file_system,
    )


def compare(recorded: Identity, current: Identity) -> Comparison:
    """Whether ``current`` is what was ``recorded``."""
    if recorded.kind != current.kind:
        text = f"it was a {recorded.kind} and now is a {current.kind}"
        return Comparison(Verdict.DIFFERENT, text)
    if recorded.kind == "mount":
        return _compare_mounts(recorded, current)
    return _compare_devices(recorded, current)


def _compare_devices(recorded: Identity, current: Identity) -> Comparison:
    by_hardware = _hardware(recorded, current)
    if by_hardware is False:
        return _different("hardware id", recorded.hardware, current.hardware)
    if recorded.part != current.part:
        return _different("partition", recorded.part or "none", current.part or "none")
    if current.size < recorded.size:
        return _different("size", recorded.size, current.size)
    if recorded.partition_uuid != current.partition_uuid and recorded.partition_uuid:
        return _different("partition UUID", recorded.partition_uuid, current.partition_uuid)
    if by_hardware:
        return Comparison(Verdict.SAME, f"hardware ids agree: {_shown(current.hardware)}")
    if recorded.hardware:
        text = f"its hardware ids ({_shown(recorded.hardware)}) cannot be read now"
        return Comparison(Verdict.UNKNOWN, text)
    return _compare_boot(recorded, current)


def _compare_boot(recorded: Identity, current: Identity) -> Comparison:
    if recorded.boot_id == current.boot_id:
        if _boot_local(recorded) != _boot_local(current):
            return _different("boot-local id", _boot_local(recorded), _boot_local(current))
        return Comparison(
            Verdict.LIKELY, "placement agrees, and the same device number in the same boot"
        )
    if recorded.size != current.size:
        return _different("size", recorded.size, current.size)
    return Comparison(Verdict.LIKELY, "placement agrees (partition, size)")


def _compare_mounts(recorded: Identity, current: Identity) -> Comparison:
    for what in ("fs_type", "root", "source"):
        before, now = getattr(recorded, what), getattr(current, what)
        if before != now:
            return _different({"fs_type": "file system type"}.get(what, what), before, now)
    by_uuid = _agree(recorded.file_system, current.file_system)
    if by_uuid is False:
        return _different("file system UUID", recorded.file_system, current.file_system)
    by_hardware = _hardware(recorded, current)
    is_elsewhere = by_hardware is False or (by_hardware and recorded.part != current.part)
    if is_elsewhere and by_uuid:
        text = f"file system UUID agrees, but it is on another disk: {_shown(current.hardware)}"
        return Comparison(Verdict.UNKNOWN, text)
    if by_uuid:
        return Comparison(Verdict.SAME, f"file system UUID agrees: {current.file_system}")
    if is_elsewhere:
        return _different("hardware id", recorded.hardware, current.hardware)
    if by_hardware:
        return Comparison(Verdict.SAME, f"hardware ids agree: {_shown(current.hardware)}")
    if recorded.file_system or current.file_system:
        return Comparison(Verdict.UNKNOWN, "its file system UUID can be read only sometimes")
    if recorded.boot_id == current.boot_id:
        if _boot_local(recorded) != _boot_local(current):
            return _different("boot-local id", _boot_local(recorded), _boot_local(current))
        return Comparison(Verdict.SAME, "the same file system in the same boot")
    if recorded.fs_type in _MEMORY or recorded.source.count(":"):
        return Comparison(Verdict.SAME, f"{recorded.fs_type} {recorded.source} as before")
    return Comparison(Verdict.UNKNOWN, "a file system without UUID, from another boot")


def _agree(one: str, other: str) -> bool | None:
    """None: they cannot be compared."""
    return one == other if one and other else None


def _hardware(one: Identity, other: Identity) -> bool | None:
    """Whether the ids that both have agree; None: they have none in common."""
    common = one.hardware.keys() & other.hardware.keys()
    if not common:
        return None
    return all(one.hardware[kind] == other.hardware[kind] for kind in common)


def _boot_local(identity: Identity) -> str:
    return f"{identity.device} (disk {identity.disk_sequence or 'unnumbered'})"


def _different(what: str, before: object, now: object) -> Comparison:
    shown = [_shown(v) if isinstance(v, dict) else str(v) or "none" for v in (before, now)]
    return Comparison(Verdict.DIFFERENT, f"{what} was {shown[0]}, is {shown[1]}")


def _shown(ids: dict[str, str]) -> str:
    return ", ".join(f"{kind} {value}" for kind, value in sorted(ids.items())) or "none"
