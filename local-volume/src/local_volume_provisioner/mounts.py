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

_FS_IOC_GETFSUUID = 0x80111500  # Linux 6.9 and later: a length byte, then 16 bytes
_BY_UUID = Path("/dev/disk/by-uuid")


@dataclass(frozen=True, slots=True)
class MountTable:
    """All mounts we see, at one moment."""

    mounts: tuple[Mount, ...]

    @classmethod
    def read(cls) -> MountTable:
        """Of our mount namespace; with ``hostPID`` of the host's too, where pods' mounts are."""
        found = _read("self")
        with suppress(OSError):
            if Path("/proc/1/ns/mnt").readlink() != Path("/proc/self/ns/mnt").readlink():
                found += _read("1")
        return cls(tuple(found))

    def at(self, path: str) -> Mount | None:
        """The topmost mount exactly at ``path``; None if there is none."""
        found = [mount for mount in self.mounts if mount.mount_point == path]
        covered = {mount.parent_id for mount in found}
        tops = [mount for mount in found if mount.mount_id not in covered]
        return tops[-1] if tops else None

    def by_point(self) -> dict[str, Mount]:
        """As ``at`` for every mount point: for who asks for a thousand."""
        points: dict[str, list[Mount]] = {}
        for mount in self.mounts:
            points.setdefault(mount.mount_point, []).append(mount)
        return {point: _topmost(mounts) for point, mounts in points.items()}

    def using(self, devices: Iterable[int]) -> list[str]:
        """Where file systems on these devices are mounted."""
        wanted = set(devices)
        return [mount.mount_point for mount in self.mounts if mount.device in wanted]


def _read(pid: str) -> list[Mount]:
    lines = Path(f"/proc/{pid}/mountinfo").read_bytes().split(b"\n")
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


def file_system_uuid(descriptor: int, mount: Mount) -> str:
    """The UUID of the file system that an open directory is on; empty where nobody can tell."""
    with suppress(OSError):
        answer = ioctl(descriptor, _FS_IOC_GETFSUUID, bytes(17))
        value = answer[1 : 1 + answer[0]]
        if len(value) == 16 and any(value):
            return str(uuid.UUID(bytes=value))
    if mount.major == 0:
        return ""
    with suppress(OSError):
        for link in _BY_UUID.iterdir():
            if link.stat().st_rdev == mount.device:
                return link.name.lower()
    return ""
