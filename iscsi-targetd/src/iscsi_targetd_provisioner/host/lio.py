"""One target a volume, LUN 0, an access list of initiators; through the host's rtslib."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Collection
from typing import Any

from iscsi_targetd_provisioner.host.common import Refused
from iscsi_targetd_provisioner.host.lvm import can_discard, device_of, serial_of
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

    def target_of(self, name: str, backstore: Any) -> Any:  # noqa: ANN401
        """The target that we made to export a backstore, or None; ``Refused`` when there is any
        other: deleting the backstore would take the disk from under that one."""
        found = {}
        for lun in backstore.attached_luns if backstore is not None else ():
            target = lun.parent_tpg.parent_target
            found[target.wwn] = target
        others = sorted(wwn for wwn in found if not is_named_after(wwn, name))
        if others or len(found) > 1:
            text = f"volume {name} is exported by {(others or sorted(found))[0]} too"
            raise Refused("foreign", f"{text}: it is left alone")
        return next(iter(found.values()), None)

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
    ) -> dict[str, Any]:
        """Make the target, or make it what it should be; its name, and whom it does not take."""
        backstore = self._backstore_of(pool, name)
        target = self.target_of(name, backstore)
        if target is None:
            target = self._unused_target(name, iqn)
        # What was there before is left in any case: its volume may be in use.
        fresh, known = backstore is None, target is not None
        self.touched.setdefault(name, set())
        try:
            if fresh:
                backstore = self._make_backstore(pool, name)
            if not known:
                target = self.rtslib.Target(self.fabric, iqn)
            self.touched[name].add(target.wwn)
            refused = self._configure(target, backstore, portals, initiators, chap)
        except BaseException:
            if target is not None and not known:
                target.delete()
            if fresh and backstore is not None:
                backstore.delete()
            raise
        return {"iqn": target.wwn, "refused": refused}

    def _backstore_of(self, pool: str, name: str) -> Any:  # noqa: ANN401
        backstore = self.backstore(name)
        if backstore is not None and backstore.udev_path != device_of(pool, name):
            raise Refused("foreign", f"backstore {name} is of {backstore.udev_path}")
        return backstore

    def _make_backstore(self, pool: str, name: str) -> Any:  # noqa: ANN401
        device = device_of(pool, name)
        # A serial of the volume's own: a backstore that is made anew is the same disk to nodes.
        made = self.rtslib.BlockStorageObject(name, dev=device, wwn=serial_of(device))
        if can_discard(device):
            made.set_attribute("emulate_tpu", "1")
        return made

    def _unused_target(self, name: str, iqn: str) -> Any:  # noqa: ANN401
        """What a crash has left between a target and its LUN, or None."""
        try:
            target = self.rtslib.Target(self.fabric, iqn, mode="lookup")
        except self.rtslib.RTSLibError:
            return None
        if not is_named_after(iqn, name) or any(list(tpg.luns) for tpg in target.tpgs):
            raise Refused("foreign", f"target {iqn} has other LUNs: it is left alone")
        return target

    def _configure(
        self,
        target: Any,  # noqa: ANN401
        backstore: Any,  # noqa: ANN401
        portals: Collection[tuple[str, int]],
        initiators: Collection[str],
        chap: Credentials,
    ) -> list[str]:
        """Returns the initiators whose name the host does not take."""
        luns = [lun for tpg in target.tpgs for lun in tpg.luns]
        if len(luns) > 1 or any(lun.storage_object.name != backstore.name for lun in luns):
            raise Refused("foreign", f"target {target.wwn} has other LUNs: it is left alone")
        tpg = self.rtslib.TPG(target, 1)
        for attribute in ("generate_node_acls", "cache_dynamic_acls"):
            tpg.set_attribute(attribute, "0")
        if not luns:
            luns = [self.rtslib.LUN(tpg, 0, backstore)]
        acls = {acl.node_wwn: acl for acl in tpg.node_acls}
        refused = self._admit(tpg, luns[0], acls, initiators)
        for wwn in set(acls) - set(initiators):
            if not acls[wwn].session:
                acls.pop(wwn).delete()
        _authenticate(tpg, acls.values(), chap)
        self._listen(tpg, portals)
        # Last: nobody logs in before all of the above holds.
        tpg.enable = True
        return refused

    def _admit(
        self,
        tpg: Any,  # noqa: ANN401
        lun: Any,  # noqa: ANN401
        acls: dict[str, Any],
        initiators: Collection[str],
    ) -> list[str]:
        """One bad name must not keep all others from the volume."""
        refused = []
        for wwn in initiators:
            if wwn not in acls:
                try:
                    acls[wwn] = self.rtslib.NodeACL(tpg, wwn)
                except self.rtslib.RTSLibError:
                    refused.append(wwn)
                    continue
            if not list(acls[wwn].mapped_luns):
                self.rtslib.MappedLUN(acls[wwn], lun.lun, lun)
        if refused and len(refused) == len(initiators):
            raise Refused("failed", f"no name of an initiator is taken, such as {refused[0]}")
        return refused

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

    def unexport(self, pool: str, name: str, iqn: str) -> None:
        """End every export of a volume; ``iqn`` is what its target would be called."""
        # Also when there is nothing to end: the saving may be what failed the last time.
        self.touched.setdefault(name, set()).add(iqn)
        backstore = self._backstore_of(pool, name)
        target = self.target_of(name, backstore)
        if target is None:
            with contextlib.suppress(Refused):
                target = self._unused_target(name, iqn)
        if target is not None:
            self.touched[name].add(target.wwn)
            used_by = [a.node_wwn for tpg in target.tpgs for a in tpg.node_acls if a.session]
            if used_by:
                raise Refused("in_use", f"logged in: {', '.join(sorted(used_by))}")
            if sum(len(list(tpg.luns)) for tpg in target.tpgs) > 1:
                raise Refused("foreign", f"target {target.wwn} has other LUNs: it is left alone")
            target.delete()
        if backstore is not None:
            backstore.delete()

    def set_auth(self, name: str, chap: Credentials) -> list[str]:
        """Returns who is logged in, and so keeps what it logged in with."""
        target = self.target_of(name, self.backstore(name))
        if target is None:
            raise Refused("not_found", f"volume {name} is not exported")
        self.touched.setdefault(name, set()).add(target.wwn)
        kept: list[str] = []
        for tpg in target.tpgs:
            kept += _authenticate(tpg, list(tpg.node_acls), chap)
        return sorted(kept)

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


def is_named_after(wwn: str, volume: str) -> bool:
    """Whether a target has the kind of name that we give to the one of a volume."""
    return wwn.lower().endswith(f":{volume}".lower())


def _authenticate(tpg: Any, acls: Collection[Any], chap: Credentials) -> list[str]:  # noqa: ANN401
    kept = []
    for acl in acls:
        wanted = {f"chap_{key}": chap[key] if chap else "" for key in CHAP_KEYS}
        changed = {key: text for key, text in wanted.items() if getattr(acl, key) != text}
        if changed and acl.session:
            # Its initiator reconnects with the secret that it logged in with.
            kept.append(acl.node_wwn)
            continue
        for key, text in changed.items():
            setattr(acl, key, text)
    tpg.set_attribute("authentication", "1" if chap else "0")
    return kept
