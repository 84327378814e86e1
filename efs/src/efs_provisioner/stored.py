"""What a volume says of itself: all that its deletion needs, for its class may be gone by then."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from efs_provisioner.file_systems import FileSystem
from efs_provisioner.parameters import OnDelete
from efs_provisioner.settings import CSI_DRIVER
from external_storage import PersistentVolume, ProvisioningFailed

FILE_SYSTEM: Final = "efs.external-storage/file-system"
PATH: Final = "efs.external-storage/path"
"""Of an access point its root directory, else the directory below the mounted one."""
ON_DELETE: Final = "efs.external-storage/on-delete"
FIXED_GID: Final = "efs.external-storage/fixed-gid"
"""Its group is the class's and not one of its own: ``true`` if the annotation of the group says
which, else its number."""

# As the driver writes it: "fs-1::fsap-2", and since 3.0 "efs:fs-1::fsap-2", too. We write the
# first, which every release of the driver can mount.
_HANDLE = re.compile(r"(?:efs:)?(fs-[0-9a-f]{8,40})::(fsap-[0-9a-f]{8,40})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Handle:
    """What the CSI driver's node plugin mounts."""

    file_system: str
    access_point: str

    def __str__(self) -> str:
        return f"{self.file_system}::{self.access_point}"


def handle_of(volume: PersistentVolume) -> Handle | None:
    """The access point of a volume of the CSI driver's; None: it is none of those."""
    csi = volume.spec.csi
    if csi is None or csi.driver != CSI_DRIVER:
        return None
    found = _HANDLE.fullmatch(csi.volume_handle)
    return Handle(found[1], found[2]) if found else None


def file_system_of(volume: PersistentVolume, systems: Mapping[str, FileSystem]) -> str | None:
    """The id of its file system; of a volume that does not say so, as those of efs-provisioner, the
    one of ``systems`` whose server it is on, if there is any."""
    handle = handle_of(volume)
    found = handle.file_system if handle else volume.metadata.annotations.get(FILE_SYSTEM)
    if found is not None or volume.spec.nfs is None:
        return found
    server = volume.spec.nfs.server
    return next((id for id, system in systems.items() if system.is_at(server)), None)


def place_of(volume: PersistentVolume, systems: Mapping[str, FileSystem]) -> tuple[str, str] | None:
    """Its file system, and its directory from the root of that on; None: on none of ours."""
    id = file_system_of(volume, systems)
    if id is None:
        return None
    if volume.spec.nfs is not None:
        return id, volume.spec.nfs.path
    # One that does not say so any more, or was forged, could be anywhere: it is in nobody's way.
    return id, volume.metadata.annotations.get(PATH, "/")


def on_delete_of(volume: PersistentVolume) -> OnDelete | None:
    """What was promised for the directory; None if nothing was."""
    text = volume.metadata.annotations.get(ON_DELETE)
    if text is None:
        return None
    try:
        return OnDelete(text)
    except ValueError:
        allowed = ", ".join(OnDelete)
        raise ProvisioningFailed(
            f"annotation {ON_DELETE} is {text[:80]!r}, want one of {allowed}: nothing is removed"
        ) from None
