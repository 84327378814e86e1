"""A directory of the machine that the tests run on, in the place of a mounted share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from external_storage import mountinfo


@dataclass(frozen=True, slots=True)
class Found:
    """What a share has to be told to expect where a directory is."""

    fs_type: str
    source: str
    """The device or name that is mounted, and the directory's path below it."""


def found_at(directory: Path) -> Found:
    """By the table of mounts; the directory need not be the top of one."""
    place = directory.resolve()
    mount = mountinfo.find(place)
    below = Path("/", mount.root.lstrip("/"), place.relative_to(mount.mount_point))
    return Found(mount.fs_type, f"{mount.source}:{below}")
