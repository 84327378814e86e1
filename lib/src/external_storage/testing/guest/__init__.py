"""A virtual machine with a storage kernel of its own, for tests that need one.

``Guest`` is the machine and all that can be done with it. It runs by emulation wherever QEMU does,
as any user; building its image, once, needs root. Debian packages on the host:
``qemu-system-x86 qemu-utils mmdebstrap openssh-client e2fsprogs``.

With QEMU's own network the guest is 10.0.2.15, and calls the host's 127.0.0.1 10.0.2.2. Commands
come over a second network card that leads nowhere else, so they work while the first is cut.

``python -m external_storage.testing.guest`` starts one to play with.
"""

from __future__ import annotations

from external_storage.testing.guest.disks import Disk
from external_storage.testing.guest.errors import CommandFailed, GuestError
from external_storage.testing.guest.guest import Guest
from external_storage.testing.guest.machine import Hardware, Tap
from external_storage.testing.guest.programs import GuestProcess
from external_storage.testing.guest.snapshot import ensure_snapshot

__all__ = [
    "CommandFailed",
    "Disk",
    "Guest",
    "GuestError",
    "GuestProcess",
    "Hardware",
    "Tap",
    "ensure_snapshot",
]
