"""A guest as storage host and as initiator: real LIO, LVM, sshd and open-iscsi."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from external_storage.testing.guest import Guest
from external_storage.testing.guest.storage import KEY, KNOWN_HOSTS, let_in, make_volume_group
from iscsi_targetd_provisioner.lio_ssh import LioSsh
from iscsi_targetd_provisioner.names import Portal
from iscsi_targetd_provisioner.ssh import Login

MIB = 1 << 20
GROUP = "vg-iscsi"
THIN = f"{GROUP}/thin"
OWNER = "example.com/iscsi"
IQN = "iqn.2026-01.com.example:storage"
INITIATOR = "iqn.2026-01.com.example:guest"
PORTAL = Portal("127.0.0.1")
"""The guest logs in to itself."""
SAVED = "/etc/rtslib-fb-target/saveconfig.json"


@dataclass
class StorageHost:
    """The guest with a volume group, a thin pool, and a key that may log in."""

    guest: Guest
    port: int
    """Of the host's loopback, to the guest's sshd."""
    directory: Path

    def login(self, **fields: Any) -> Login:
        given = {"key_file": self.directory / KEY, **fields}
        known = self.directory / KNOWN_HOSTS
        return Login(host="127.0.0.1", port=self.port, known_hosts=known, **given)

    def backend(self, **fields: Any) -> LioSsh:
        given = {"owner": OWNER, "iqn": IQN, "pools": {GROUP: 1.0, THIN: 1.0}, **fields}
        login = given.pop("login", None) or self.login()
        return LioSsh("storage", login, listen=(PORTAL,), **given)

    def allow(self, line: str) -> None:
        """One more line of authorized_keys."""
        self.guest.run("cat >>/root/.ssh/authorized_keys", input=line + "\n")

    def config(self) -> dict[str, object]:
        """For the file of servers."""
        return {
            "type": "lio-ssh",
            "ssh": {
                "host": "127.0.0.1",
                "port": self.port,
                "knownHosts": str(self.directory / KNOWN_HOSTS),
                "keyFile": str(self.directory / KEY),
            },
            "iqn": IQN,
            "portals": [str(PORTAL)],
            "pools": [GROUP, {"name": THIN, "overcommit": 1.0}],
        }

    def volumes(self) -> set[str]:
        """Logical volumes, whoever made them, but the pool."""
        names = self.guest.run(["lvs", "--noheadings", "-o", "lv_name", GROUP]).split()
        return set(names) - {"thin"}

    def running(self) -> set[str]:
        """Targets that the kernel has."""
        listed = self.guest.run("ls /sys/kernel/config/target/iscsi 2>/dev/null || true").split()
        return {name for name in listed if name.startswith("iqn.")}

    def passwords(self, volume: str) -> set[str]:
        """What the volume's initiators have to show."""
        acls = f"/sys/kernel/config/target/iscsi/{IQN}:{volume}/tpgt_1/acls"
        text = self.guest.run(f"for acl in {acls}/*; do cat $acl/auth/password; echo; done")
        # The kernel's word for none.
        return {line.removeprefix("NULL") for line in text.splitlines() if line} or {""}

    def saved(self) -> str:
        return self.guest.run(f"cat {SAVED} 2>/dev/null || true")

    def iscsiadm(self, *argv: str, check: bool = True) -> str:
        return self.guest.run(["iscsiadm", *argv], check=check)

    def log_in(
        self,
        iqn: str,
        settings: Sequence[tuple[str, str]] = (),
        *,
        interface: str = "default",
        portal: Portal = PORTAL,
    ) -> int:
        """As the kubelet does it, with these settings of the node record; the exit code."""
        record = ("-m", "node", "-T", iqn, "-p", str(portal), "-I", interface)
        self.iscsiadm(*record, "-o", "delete", check=False)
        self.iscsiadm(*record, "-o", "new")
        for key, value in settings:
            self.iscsiadm(*record, "-o", "update", "-n", key, "-v", value)
        return self.guest.execute(["iscsiadm", *record, "--login"]).returncode

    def pretend_to_be(self, initiator: str) -> str:
        """An interface by which the guest logs in under another name."""
        interface = initiator.rpartition(":")[2]
        self.iscsiadm("-m", "iface", "-I", interface, "-o", "new", check=False)
        name = ("-n", "iface.initiatorname", "-v", initiator)
        self.iscsiadm("-m", "iface", "-I", interface, "-o", "update", *name)
        return interface

    def log_out(self, iqn: str, *, portal: Portal = PORTAL) -> None:
        self.iscsiadm("-m", "node", "-T", iqn, "-p", str(portal), "--logout", check=False)

    def disk(self, iqn: str) -> str:
        """The device file of LUN 0."""
        path = f"/dev/disk/by-path/ip-{PORTAL}-iscsi-{iqn}-lun-0"
        wait = (
            f"for i in $(seq 600); do [ -b {path} ] && readlink -f {path} && exit; sleep 0.1; done"
        )
        return self.guest.run(f"udevadm settle; {wait}; exit 1").strip()

    def clear(self) -> None:
        """Leave nothing of ours, whoever agrees."""
        run = self.guest.run
        run("umount /mnt; iscsiadm -m node --logoutall=all; rm -rf /etc/iscsi/nodes", check=False)
        if self.running():
            run(["targetcli", "clearconfig", "confirm=true"], check=False)
        run(f"rm -f {SAVED}")
        for name in self.volumes():
            run(["lvremove", "-qqy", f"{GROUP}/{name}"], check=False)


@contextlib.contextmanager
def storage_host(directory: Path) -> Iterator[StorageHost]:
    with Guest(name=f"storage-{uuid.uuid4().hex[:4]}") as guest:
        guest.run(f"printf 'InitiatorName={INITIATOR}\\n' >/etc/iscsi/initiatorname.iscsi")
        guest.run("pkill -x iscsid; iscsid")
        make_volume_group(guest, GROUP, size=1024 * MIB, thin_pool=256 * MIB)
        host = StorageHost(guest, guest.forward(22), directory)
        let_in(guest, directory, host="127.0.0.1", port=host.port)
        yield host
