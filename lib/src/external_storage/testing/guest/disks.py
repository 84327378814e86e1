"""Disks of a guest: files of the host, plugged in and pulled out while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from external_storage.testing.guest.errors import GuestError
from external_storage.testing.guest.machine import SCSI_SLOT, Plug

Bus = Literal["virtio", "scsi"]

# The slots below are taken by what the machine always has.
_SLOTS: Final = {"virtio": range(8, 32), "scsi": range(256)}
# What QEMU hands over of a longer one is cut off without a word.
_SERIAL_LENGTHS: Final = {"virtio": 20, "scsi": 36}


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk of one guest; ``Guest.path`` says where it is there."""

    name: str
    """Within the guest's machine."""
    file: Path
    """Its content on the host, raw."""
    bus: Bus
    slot: int
    """The PCI slot of a virtio disk, the target of a SCSI disk: the same after a reboot."""
    serial: str | None
    wwn: int | None
    write_zeroes: bool
    discard: bool
    read_only: bool
    is_ours: bool
    """Whether the file is deleted with the disk."""

    @property
    def plug(self) -> Plug:
        """How QEMU is told of it."""
        blockdev = {
            "driver": "raw",
            "node-name": self.name,
            "read-only": self.read_only,
            "discard": "unmap",
            # As for the root disk: the host's page cache outlives QEMU.
            "cache": {"no-flush": True},
            "file": {"driver": "file", "filename": str(self.file), "locking": "off"},
        }
        device: dict[str, object] = {"id": f"{self.name}-plug", "drive": self.name}
        if self.bus == "virtio":
            device |= {"driver": "virtio-blk-pci", "addr": f"{self.slot:#x}"}
            device |= {"write-zeroes": self.write_zeroes, "discard": self.discard}
        else:
            device |= {"driver": "scsi-hd", "bus": "scsi.0", "scsi-id": self.slot, "lun": 0}
            if not self.discard:
                device["discard_granularity"] = 0
        if self.serial is not None:
            device["serial"] = self.serial
        if self.wwn is not None:
            device["wwn"] = self.wwn
        return Plug(blockdev=blockdev, device=device)

    @property
    def find(self) -> str:
        """A shell command for the guest that waits for its device file and prints the path."""
        if self.bus == "virtio":
            pattern = f"0000:00:{self.slot:02x}.0/virtio*/block/*"
        else:
            card = f"0000:00:{SCSI_SLOT:02x}.0/virtio*"
            pattern = f"{card}/host*/target*/*:0:{self.slot}:0/block/*"
        # Two minutes: longer than a guest on a busy machine ever takes.
        return (
            f"for i in $(seq 1200); do for p in /sys/bus/pci/devices/{pattern}; do "
            '[ -b "/dev/${p##*/}" ] && udevadm settle && echo "/dev/${p##*/}" && exit; '
            "done; sleep 0.1; done; exit 1"
        )


def check(*, size: int, bus: Bus, serial: str | None, wwn: int | None, write_zeroes: bool) -> None:
    """Raise ``ValueError`` for a disk that cannot be had."""
    if size <= 0 or size % 512:
        raise ValueError(f"size {size}: a disk has a positive number of 512-byte sectors")
    if bus == "virtio" and wwn is not None:
        raise ValueError("a virtio disk has no wwn: leave out bus, or say bus='scsi'")
    if bus == "scsi" and not write_zeroes:
        raise ValueError("QEMU's SCSI disks always can write zeroes: say bus='virtio'")
    if serial is not None and len(serial) > _SERIAL_LENGTHS[bus]:
        longest = _SERIAL_LENGTHS[bus]
        raise ValueError(f"serial {serial!r}: a {bus} disk's has at most {longest} characters")


def free_slot(bus: Bus, disks: list[Disk]) -> int:
    """The lowest slot of ``bus`` that none of ``disks`` has."""
    taken = {disk.slot for disk in disks if disk.bus == bus}
    free = next((slot for slot in _SLOTS[bus] if slot not in taken), None)
    if free is None:
        raise GuestError(f"a guest has room for {len(_SLOTS[bus])} {bus} disks, all are taken")
    return free
