"""A guest as a storage host: logical volumes, and an SSH key of its admin's."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from external_storage.testing.guest.guest import Guest
from external_storage.testing.guest.image import do

KEY: Final = "ssh-key"
KNOWN_HOSTS: Final = "known_hosts"
_SSH_PORT: Final = 22
_LVM_LIMIT_S: Final = 120.0


def make_key(path: Path, *, passphrase: str = "") -> str:
    """Make an SSH key, the files ``path`` and ``path``.pub; its public half, a line."""
    do(["ssh-keygen", "-q", "-t", "ed25519", "-C", "test", "-N", passphrase, "-f", path])
    return path.with_name(f"{path.name}.pub").read_text(encoding="ascii").strip()


def let_in(guest: Guest, directory: Path, *, host: str, port: int = _SSH_PORT) -> None:
    """Make the files ``KEY``, by which root of the guest lets in, and ``KNOWN_HOSTS``.

    ``host`` and ``port``: where who has them reaches the guest.
    """
    guest.run("cat >>/root/.ssh/authorized_keys", input=make_key(directory / KEY) + "\n")
    kind, key = guest.run("cat /etc/ssh/ssh_host_ed25519_key.pub").split()[:2]
    name = host if port == _SSH_PORT else f"[{host}]:{port}"
    (directory / KNOWN_HOSTS).write_text(f"{name} {kind} {key}\n", encoding="ascii")


def make_volume_group(guest: Guest, name: str, *, size: int, thin_pool: int = 0) -> None:
    """Make the volume group ``name`` on a new disk of ``size`` bytes.

    ``thin_pool``: bytes of a thin pool ``thin`` in it; 0: none.
    """
    disk = guest.path(guest.add_disk(size))
    guest.run(["vgcreate", "-qq", name, disk], timeout_s=_LVM_LIMIT_S)
    if thin_pool:
        create = ("lvcreate", "-qqy", "-L", f"{thin_pool}B", "-T", f"{name}/thin")
        guest.run(create, timeout_s=_LVM_LIMIT_S)
