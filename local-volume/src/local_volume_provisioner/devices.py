"""What sysfs says of a block device; read by device number, so that no path is trusted."""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path

SYSFS = Path("/sys/dev/block")
UDEV = Path("/run/udev/data")
_SECTOR = 512
_MAX_DEPTH = 16
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO = struct.Struct("<QQQQQIIII64s64s32s2Q")
_NO_ID = re.compile(
    # What names the slot, or every disk of a maker: QEMU's defaults, and USB bridges without one.
    r"QM0000\d|drive-(scsi|ide|sata|virtio|usb)|0123456789|^(none|unknown|default|n/?a)$",
    re.IGNORECASE,
)
# The kernel's own ids of a disk, by the attribute of sysfs that has them.
_HARDWARE = {
    "wwn": ("wwid", "device/wwid"),
    "serial": ("serial", "device/serial"),
    "dm": ("dm/uuid",),
}
# What udev knows beyond that, if its database is mounted into our container.
_UDEV_HARDWARE = {"wwn": "ID_WWN_WITH_EXTENSION", "serial": "ID_SERIAL", "md": "MD_UUID"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One block device as it is now."""

    number: int
    """``st_rdev``."""
    name: str
    size: int
    """Bytes."""
    read_only: bool
    hardware: dict[str, str]
    """Ids of the disk itself, of a partition those of its disk; by kind."""
    disk_sequence: str
    """Grows with each disk that appears; empty before Linux 5.15."""
    partition: int
    """The number of the partition; 0 for a whole disk."""
    start: int
    """Where the partition begins, in bytes."""
    partition_uuid: str
    parent: int
    """The disk's number; 0 for a whole disk."""
    partitions: tuple[int, ...]
    holders: tuple[str, ...]
    """Names of devices on top: LVM, md, crypt, bcache."""
    below: tuple[int, ...]
    """Numbers of devices that it lies on."""

    @property
    def major_minor(self) -> str:
        return f"{os.major(self.number)}:{os.minor(self.number)}"


def read(number: int) -> Device:
    """Raises FileNotFoundError when there is no such device, OSError."""
    directory = (SYSFS / f"{os.major(number)}:{os.minor(number)}").resolve(strict=True)
    partition = int(_text(directory / "partition") or 0)
    disk = directory.parent if partition else directory
    uevent = _pairs(_text(directory / "uevent").splitlines())
    udev = _udev(number)
    return Device(
        number=number,
        name=directory.name,
        size=int(_text(directory / "size") or 0) * _SECTOR,
        read_only=_text(directory / "ro") == "1",
        hardware=_hardware(disk),
        disk_sequence=_text(disk / "diskseq"),
        partition=partition,
        start=int(_text(directory / "start") or 0) * _SECTOR,
        partition_uuid=(uevent.get("PARTUUID") or udev.get("ID_PART_ENTRY_UUID", "")).lower(),
        parent=_number(disk) if partition else 0,
        partitions=() if partition else tuple(_number(path) for path in _partitions(disk)),
        holders=tuple(sorted(path.name for path in _entries(directory / "holders"))),
        below=tuple(_number(path) for path in _entries(directory / "slaves")),
    )


def family(device: Device) -> set[int]:
    """The numbers of all devices that share data with it: its disk or its partitions, and those
    above and below."""
    found = {device.number}
    _gather(device, found, _ancestors, 0)
    _gather(device, found, _descendants, 0)
    return found


def above(device: Device) -> set[int]:
    """Its own number, and those of all devices that lie on it: partitions, LVM, md, crypt."""
    found = {device.number}
    _gather(device, found, _descendants, 0)
    return found


def _gather(device: Device, found: set[int], step: object, depth: int) -> None:
    if depth > _MAX_DEPTH:
        return
    for number in step(device):  # type: ignore[operator]
        if number not in found:
            found.add(number)
            with suppress(OSError):
                _gather(read(number), found, step, depth + 1)


def _ancestors(device: Device) -> Iterable[int]:
    return (*device.below, *([device.parent] if device.parent else []))


def _descendants(device: Device) -> Iterable[int]:
    holders = _entries(SYSFS / device.major_minor / "holders")
    return (*device.partitions, *(_number(path) for path in holders))


def swaps() -> set[int]:
    """The numbers of devices in use as swap, as far as their paths lead anywhere here."""
    found = set()
    for line in _text(Path("/proc/swaps")).splitlines()[1:]:
        path = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), line.split()[0])
        with suppress(OSError):
            found.add(Path(path).stat().st_rdev)
        with suppress(OSError):
            found.add(_number((Path("/sys/class/block") / Path(path).name).resolve(strict=True)))
    return found - {0}


def loops_over(numbers: set[int]) -> list[str]:
    """Names of loop devices whose backing file is one of these devices: a pod's raw volume.

    The kernel is asked for the number: the path it shows is one of another mount namespace. OSError
    when one cannot be asked.
    """
    found = []
    for loop in sorted(Path("/sys/block").glob("loop*/loop")):
        name = loop.parent.name
        try:
            descriptor = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if not loop.exists():
                continue  # it has been taken off meanwhile
            raise
        try:
            answer = ioctl(descriptor, _LOOP_GET_STATUS64, bytes(_LOOP_INFO.size))
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.EOVERFLOW):
                raise
            continue
        finally:
            os.close(descriptor)
        if _decoded(_LOOP_INFO.unpack(answer)[2]) in numbers:
            found.append(name)
    return found


def _decoded(number: int) -> int:
    """A device number as the kernel packs it into 32 bits."""
    return os.makedev((number >> 8) & 0xFFF, (number & 0xFF) | ((number >> 12) & 0xFFF00))


def _hardware(disk: Path) -> dict[str, str]:
    found = {}
    for kind, attributes in _HARDWARE.items():
        value = next((text for a in attributes if (text := _text(disk / a))), "")
        if is_id(value):
            found[kind] = value
    if not found:
        udev = _udev(_number(disk))
        if "ID_SERIAL_SHORT" not in udev:
            udev = {key: value for key, value in udev.items() if key != "ID_SERIAL"}  # the model
        found = {k: udev[key] for k, key in _UDEV_HARDWARE.items() if is_id(udev.get(key, ""))}
    return found


def is_id(text: str) -> bool:
    """Whether it can be one disk's own."""
    return len(set(re.sub(r"[\W_]", "", text))) > 1 and not _NO_ID.search(text)


def _udev(number: int) -> dict[str, str]:
    lines = _text(UDEV / f"b{os.major(number)}:{os.minor(number)}").splitlines()
    return _pairs(line[2:] for line in lines if line.startswith("E:"))


def _pairs(lines: Iterable[str]) -> dict[str, str]:
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def _partitions(disk: Path) -> list[Path]:
    return [path for path in _entries(disk) if (path / "partition").exists()]


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _number(path: Path) -> int:
    major, _, minor = _text(path / "dev").partition(":")
    return os.makedev(int(major or 0), int(minor or 0))


def _text(path: Path) -> str:
    """Empty for what is not there: devices have what their drivers know."""
    try:
        return path.read_bytes().decode(errors="replace").strip().strip("\0").strip()
    except OSError:
        return ""
