"""One target a volume, LUN 0, an access list of initiators; through the host's rtslib."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import Any

from iscsi_targetd_provisioner.host.common import Refused
from iscsi_targetd_provisioner.host.lvm import device_of
from iscsi_targetd_provisioner.host.saved import Touched, merged, read_saved, write_saved

CHAP_KEYS = ("userid", "password", "mutual_userid", "mutual_password")

Credentials = Any
"""The four CHAP keys, the mutual ones empty for one-way; None for no CHAP."""


class Lio:
    """Targets and backstores named after their volumes."""

    def __init__(self) -> None:
        self.rtslib: Any = importlib.import_module("rtslib_fb")
        self.save_file: str = importlib.import_module("rtslib_fb.root").default_save_file
        self.rtslib.RTSRoot()
        self.fabric = self.rtslib.FabricModule("iscsi")
        self.touched: Touched = {}

    def forget_cached(self) -> None:
        """Have rtslib look at the kernel again: it remembers which backstores there are, and others
        work on this host between our turns. A number that it takes for free would be taken."""
        getattr(importlib.import_module("rtslib_fb.tcm"), "bs_cache", {}).clear()

    def backstore(self, name: str) -> Any:  # noqa: ANN401 - rtslib has no types
        """The backstore of a volume, or None."""
        try:
            return self.rtslib.BlockStorageObject(name)
        except self.rtslib.RTSLibError:
            return None

    def target_of(self, backstore: Any) -> Any:  # noqa: ANN401
        """The target that exports a backstore, or None."""
        for lun in backstore.attached_luns:
            return lun.parent_tpg.parent_target
        return None

    def exports(self) -> list[dict[str, Any]]:
        found = []
        for target in self.fabric.targets:
            for tpg in target.tpgs:
                acls = list(tpg.node_acls)
                for lun in tpg.luns:
                    backstore = lun.storage_object
                    entry = {
                        "name": backstore.name,
                        "device": backstore.udev_path,
                        "iqn": target.wwn,
                        "lun": lun.lun,
                        "initiators": [acl.node_wwn for acl in acls],
                        "sessions": [acl.node_wwn for acl in acls if acl.session],
                        "portals": [
                            [portal.ip_address.strip("[]"), portal.port]
                            for portal in tpg.network_portals
                        ],
                    }
                    found.append(entry)
        return found

    def export(
        self,
        pool: str,
        name: str,
        *,
        iqn: str,
        portals: Collection[tuple[str, int]],
        initiators: Collection[str],
        chap: Credentials,
    ) -> str:
        """Make the target, or make it what it should be; its name."""
        device = device_of(pool, name)
        backstore = self.backstore(name)
        fresh = backstore is None
        if fresh:
            backstore = self.rtslib.BlockStorageObject(name, dev=device)
        elif backstore.udev_path != device:
            raise Refused("foreign", f"backstore {name} is of {backstore.udev_path}")
        target = None if fresh else self.target_of(backstore)
        known = target is not None
        self.touched.setdefault(name, set())
        try:
            if target is None:
                target = self.rtslib.Target(self.fabric, iqn)
            self.touched[name].add(target.wwn)
            self._configure(target, backstore, portals, initiators, chap)
        except BaseException:
            # What was there before is left: its volume may be in use.
            if target is not None and not known:
                target.delete()
            if fresh:
                backstore.delete()
            raise
        wwn: str = target.wwn
        return wwn

    def _configure(
        self,
        target: Any,  # noqa: ANN401
        backstore: Any,  # noqa: ANN401
        portals: Collection[tuple[str, int]],
        initiators: Collection[str],
        chap: Credentials,
    ) -> None:
        tpg = self.rtslib.TPG(target, 1)
        for attribute in ("generate_node_acls", "cache_dynamic_acls"):
            tpg.set_attribute(attribute, "0")
        luns = list(tpg.luns)
        if not luns:
            luns = [self.rtslib.LUN(tpg, 0, backstore)]
        elif len(luns) > 1 or luns[0].storage_object.name != backstore.name:
            raise Refused("foreign", f"target {target.wwn} has other LUNs: it is left alone")
        acls = {acl.node_wwn: acl for acl in tpg.node_acls}
        for wwn in initiators:
            if wwn not in acls:
                acls[wwn] = self.rtslib.NodeACL(tpg, wwn)
            if not list(acls[wwn].mapped_luns):
                self.rtslib.MappedLUN(acls[wwn], luns[0].lun, luns[0])
        for wwn in set(acls) - set(initiators):
            if not acls[wwn].session:
                acls.pop(wwn).delete()
        _authenticate(tpg, acls.values(), chap)
        self._listen(tpg, portals)
        # Last: nobody logs in before all of the above holds.
        tpg.enable = True

    def _listen(self, tpg: Any, portals: Collection[tuple[str, int]]) -> None:  # noqa: ANN401
        wanted = {(f"[{host}]" if ":" in host else host, port) for host, port in portals}
        present = {(portal.ip_address, portal.port): portal for portal in tpg.network_portals}
        for host, port in sorted(wanted - set(present)):
            try:
                self.rtslib.NetworkPortal(tpg, host, port)
            except self.rtslib.RTSLibError:
                text = (
                    f"cannot listen on {host}:{port}: is it an address of this host, and not taken "
                    "by a target that listens on all addresses?"
                )
                raise Refused("failed", text) from None
        for key in set(present) - wanted:
            present[key].delete()

    def unexport(self, name: str, iqn: str) -> None:
        """End every export of a volume; ``iqn`` is what its target would be called."""
        # Also when there is nothing to end: the saving may be what failed the last time.
        self.touched.setdefault(name, set()).add(iqn)
        backstore = self.backstore(name)
        target = None if backstore is None else self.target_of(backstore)
        if target is None:
            target = self._empty_target(iqn)
        if target is not None:
            self.touched[name].add(target.wwn)
            used_by = [a.node_wwn for tpg in target.tpgs for a in tpg.node_acls if a.session]
            if used_by:
                raise Refused("in_use", f"logged in: {', '.join(sorted(used_by))}")
            target.delete()
        if backstore is not None:
            backstore.delete()

    def _empty_target(self, iqn: str) -> Any:  # noqa: ANN401
        """What a crash has left between a target and its LUN, or None."""
        try:
            target = self.rtslib.Target(self.fabric, iqn, mode="lookup")
        except self.rtslib.RTSLibError:
            return None
        return None if any(list(tpg.luns) for tpg in target.tpgs) else target

    def set_auth(self, name: str, chap: Credentials) -> None:
        backstore = self.backstore(name)
        target = None if backstore is None else self.target_of(backstore)
        if target is None:
            raise Refused("not_found", f"volume {name} is not exported")
        self.touched.setdefault(name, set()).add(target.wwn)
        for tpg in target.tpgs:
            _authenticate(tpg, list(tpg.node_acls), chap)

    def save(self) -> None:
        """Bring our entries of the saved configuration up to date; those of others stay."""
        if not self.touched:
            return
        before = read_saved(self.save_file)
        backstores = {name: self._dump_backstore(name) for name in self.touched}
        wwns: set[str] = set().union(*self.touched.values())
        targets = {wwn: self._dump_target(wwn) for wwn in wwns}
        after = merged(before, backstores, targets)
        if after != before:
            write_saved(self.save_file, after)
        self.touched.clear()

    def _dump_backstore(self, name: str) -> dict[str, Any] | None:
        backstore = self.backstore(name)
        return None if backstore is None else backstore.dump()

    def _dump_target(self, wwn: str) -> dict[str, Any] | None:
        try:
            dump: dict[str, Any] = self.rtslib.Target(self.fabric, wwn, mode="lookup").dump()
        except self.rtslib.RTSLibError:
            return None
        return dump


def _authenticate(tpg: Any, acls: Collection[Any], chap: Credentials) -> None:  # noqa: ANN401
    for acl in acls:
        for key in CHAP_KEYS:
            value = chap[key] if chap else ""
            if getattr(acl, f"chap_{key}") != value:
                setattr(acl, f"chap_{key}", value)
    tpg.set_attribute("authentication", "1" if chap else "0")
