"""The table of mounts as discovery needs it, and the UUID of a mounted file system."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from fcntl import ioctl
from functools import lru_cache
from pathlib import Path

from external_storage import get_logger, mountinfo
from external_storage.mountinfo import Mount

log = get_logger(__name__)

# A call on another one may never return: it is made by a process that can be killed.
LOCAL = frozenset(
    (
        *("bcachefs", "btrfs", "devtmpfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs"),
        *("jfs", "ntfs3", "overlay", "ramfs", "squashfs", "tmpfs", "vfat", "xfs", "zfs"),
    )
)
_FS_IOC_GETFSUUID = 0x80111500  # Linux 6.9 and later: a length byte, then 16 bytes
_BY_UUID = Path("/dev/disk/by-uuid")


@dataclass(frozen=True, slots=True)
class MountTable:
    """All mounts we see, at one moment."""

    mounts: tuple[Mount, ...]
    """Of our namespace. The host's own are not among them, but for those that propagate to us: who
    wants to know of every use of a device asks the kernel, by an exclusive open."""

    @classmethod
    def read(cls) -> MountTable:
        return cls(tuple(_read()))

    def by_point(self) -> dict[str, Mount]:
        """The topmost mount at every mount point."""
        points: dict[str, list[Mount]] = {}
        for mount in self.mounts:
            points.setdefault(mount.mount_point, []).append(mount)
        return {point: _topmost(mounts) for point, mounts in points.items()}

    def using(self, devices: Iterable[int]) -> list[str]:
        """Where file systems on these devices are mounted."""
        wanted = set(devices)
        return [mount.mount_point for mount in self.mounts if mount.device in wanted]


def _read() -> list[Mount]:
    lines = Path("/proc/self/mountinfo").read_bytes().split(b"\n")
    return [mount for line in lines if line and (mount := _parsed(line)) is not None]


# Pods come and go, and nearly all lines stay as they are.
@lru_cache(maxsize=8192)
def _parsed(line: bytes) -> Mount | None:
    try:
        return mountinfo.parse_line(line)
    except ValueError as error:
        log.warning("a line of mountinfo is left out", line=os.fsdecode(line), error=error)
        return None


def _topmost(mounts: list[Mount]) -> Mount:
    covered = {mount.parent_id for mount in mounts}
    tops = [mount for mount in mounts if mount.mount_id not in covered]
    return (tops or mounts)[-1]


def uuid_of(mount: Mount) -> str:
    """As ``file_system_uuid``, of what is mounted there. Raises OSError."""
    if mount.fs_type not in LOCAL:
        return ""
    descriptor = os.open(mount.mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return file_system_uuid(descriptor, mount)
    finally:
        os.close(descriptor)


def file_system_uuid(descriptor: int, mount: Mount) -> str:
    """The UUID of the file system that an open directory is on; empty where nobody can tell, as of
    those of servers."""
    if mount.fs_type not in LOCAL:
        return ""
    with suppress(OSError):
        answer = ioctl(descriptor, _FS_IOC_GETFSUUID, bytes(17))
        value = answer[1 : 1 + answer[0]]
        if len(value) == 16 and any(value):
            return str(uuid.UUID(bytes=value))
    if mount.major == 0:
        return ""
    with suppress(OSError):
        for link in _BY_UUID.iterdir():
            with suppress(OSError):  # one that leads nowhere hides no other
                if link.stat().st_rdev == mount.device:
                    return link.name.lower()
    return ""
