"""What a volume says of itself: all that its deletion needs, for its class may be gone by then."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from efs_provisioner.parameters import OnDelete
from efs_provisioner.settings import CSI_DRIVER
from external_storage import PersistentVolume, ProvisioningFailed

FILE_SYSTEM: Final = "efs.external-storage/file-system"
PATH: Final = "efs.external-storage/path"
"""Of an access point its root directory, else the directory below the mounted one."""
ON_DELETE: Final = "efs.external-storage/on-delete"
FIXED_GID: Final = "efs.external-storage/fixed-gid"
"""Its group is the class's and not one of its own."""

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


def file_system_of(volume: PersistentVolume) -> str | None:
    """The id of its file system; None if it does not say so, as those of efs-provisioner."""
    handle = handle_of(volume)
    return handle.file_system if handle else volume.metadata.annotations.get(FILE_SYSTEM)


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
