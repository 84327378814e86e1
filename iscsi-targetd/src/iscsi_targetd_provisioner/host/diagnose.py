"""What an admin has to set up on the host, looked at: ``[grade, text, advice]`` each."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from iscsi_targetd_provisioner.host.common import Refused, run
from iscsi_targetd_provisioner.host.lio import Lio
from iscsi_targetd_provisioner.host.lvm import Lvm
from iscsi_targetd_provisioner.host.saved import read_saved

GOOD, WARNING, BAD = "ok", "warning", "error"
RESTORE_SERVICES = ("target.service", "rtslib-fb-targetctl.service")
TARGET_MODULE = Path("/sys/module/iscsi_target_mod")
_FULL_PERCENT = 80.0

Found = tuple[str, str, str]


class Diagnosis:
    """Reads only."""

    def __init__(self, lvm: Lvm, lio: Lio) -> None:
        self.lvm = lvm
        self.lio = lio

    def findings(self, pools: list[list[Any]], portals: list[list[Any]]) -> list[Found]:
        found = [self._kernel(), self._restored(), self._saved()]
        found += [self._pool(str(name), float(factor)) for name, factor in pools]
        found += self._fill({str(name) for name, _ in pools})
        found += [_portal(str(host), int(port)) for host, port in portals]
        return found

    def _kernel(self) -> Found:
        if TARGET_MODULE.exists():
            return GOOD, f"kernel {os.uname().release} has the iSCSI target", ""
        return BAD, "the kernel has no iSCSI target", "modprobe iscsi_target_mod"

    def _restored(self) -> Found:
        for service in RESTORE_SERVICES:
            try:
                state = run(["systemctl", "is-enabled", service], self.lvm.limit_s()).strip()
            except Refused:
                continue
            if state == "enabled":
                return GOOD, f"{service} restores the targets after a boot", ""
        names = " or ".join(RESTORE_SERVICES)
        return WARNING, "no service restores the targets after a boot", f"systemctl enable {names}"

    def _saved(self) -> Found:
        """Whether what is running would come back."""
        path = self.lio.save_file
        try:
            saved = read_saved(path)
        except (Refused, OSError) as error:
            return BAD, str(error), "repair it before the host is booted"
        names = {target["wwn"] for target in (saved or {}).get("targets", [])}
        missing = sorted({export["iqn"] for export in self.lio.exports()} - names)
        if missing:
            text = f"{len(missing)} running targets are not in {path}, such as {missing[0]}"
            return WARNING, text, "targetcli saveconfig"
        return GOOD, f"{path} has all running targets", ""

    def _pool(self, name: str, factor: float) -> Found:
        try:
            (pool,) = self.lvm.pools([(name, factor)])
        except Refused as error:
            return BAD, str(error), "make it, or correct pools in the configuration of servers"
        mib = pool["free"] >> 20
        grade = GOOD if mib else WARNING
        return grade, f"pool {name}: {mib} MiB of {pool['size'] >> 20} MiB are free", ""

    def _fill(self, names: set[str]) -> list[Found]:
        found = []
        for row in self.lvm.rows():
            name = f"{row['vg_name']}/{row['lv_name']}"
            for what in ("data", "metadata"):
                percent = float(row[f"{what}_percent"] or 0)
                if name in names and percent > _FULL_PERCENT:
                    text = f"thin pool {name}: its {what} is {percent:.0f} % full"
                    found.append((BAD, text, f"lvextend {name}: a full pool stops every volume"))
        return found


def _portal(host: str, port: int) -> Found:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    text = f"portal {host}:{port}"
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            return BAD, f"{text}: {error.strerror}", "name an address of this host in `listen`"
    return GOOD, f"{text} is an address of this host", ""
