"""The targetd backend: one target for all volumes, a LUN for each, over JSON-RPC.

targetd has no lock between looking for a free LUN and taking it, no idempotence, and says what it
does not like in a handful of codes: a state that is the wanted one is a success, whatever its code.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from external_storage import (
    Deadline,
    Infeasible,
    ProvisionerError,
    ProvisioningFailed,
    VolumeInUse,
    get_logger,
)
from iscsi_targetd_provisioner.backend import (
    Access,
    Backend,
    Export,
    Finding,
    Grade,
    Pool,
    Target,
    Volume,
    begun,
)
from iscsi_targetd_provisioner.chap import Chap
from iscsi_targetd_provisioner.rpc import Rpc, RpcError

log = get_logger(__name__)

NAME_CONFLICT = -50
VOLUME_NOT_FOUND = -103
INVALID_POOL = -110
EXPORT_NOT_FOUND = -151
EXPORTED = -303
OTHER = -1

_LUN_TRIES = 5
CHAP_OFF = (
    "targetd sets the attribute authentication=0 on its target with every export: CHAP is not "
    "asked for, and a node that offers it is turned away. After each new volume, set "
    "authentication=1 on the target's TPG (targetcli), or use the lio-ssh backend"
)


class Targetd(Backend):
    """One targetd."""

    enforces_chap = False

    def __init__(
        self, name: str, rpc: Rpc, *, iqn: str, pools: Sequence[str] = (), max_lun: int = 255
    ) -> None:
        """
        Args:
            iqn: the target's name; targetd does not tell it.
            pools: those that we may use; none: all block pools it has.
        """
        self.name = name
        self._rpc = rpc
        self._iqn = iqn
        self._pools = tuple(pools)
        self._max_lun = max_lun
        self._exporting = threading.Lock()
        """Between looking for a LUN and having it."""

    def pools(self, deadline: Deadline) -> list[Pool]:
        found = {
            entry["name"]: Pool(
                name=entry["name"],
                size=int(entry["size"]),
                free=int(entry["free_size"]),
                # It does not say so; for ZFS the slash means something else, but so does "thin".
                thin="/" in entry["name"],
            )
            for entry in self._read("pool_list", deadline)
            if entry.get("type") == "block"
        }
        missing = [name for name in self._pools if name not in found]
        if missing:
            has = ", ".join(sorted(found)) or "none"
            raise ProvisioningFailed(f"{self._rpc.host} has no pool {missing[0]}; it has: {has}")
        return [pool for name, pool in found.items() if not self._pools or name in self._pools]

    def volumes(self, deadline: Deadline) -> list[Volume]:
        names = self._pools or [pool.name for pool in self.pools(deadline)]
        return [volume for name in names for volume in self._volumes(name, deadline)]

    def exports(self, deadline: Deadline) -> list[Export]:
        by_lun: dict[tuple[str, str, int], set[str]] = {}
        for entry in self._export_list(deadline):
            key = (entry["vol_name"], entry["pool"], int(entry["lun"]))
            by_lun.setdefault(key, set()).add(entry["initiator_wwn"])
        return [
            Export(
                volume=name,
                pool=pool,
                target=Target(iqn=self._iqn, lun=lun),
                initiators=frozenset(initiators),
            )
            for (name, pool, lun), initiators in by_lun.items()
        ]

    def create(self, pool: str, name: str, size: int, *, deadline: Deadline) -> Volume:
        # What cannot be listed cannot be exported either: better now than with a volume made.
        self._export_list(deadline)
        try:
            self._change("vol_create", deadline, pool=pool, name=name, size=size)
        except RpcError as error:
            if error.code == OTHER and _is_full(error):
                raise Infeasible(str(error)) from error
            if error.code != NAME_CONFLICT:
                raise
        with begun():
            volume = self._find(pool, name, deadline)
            if volume is None:
                self._remove_thick(pool, name, deadline)
            if volume.size < size:
                return self.resize(pool, name, size, deadline=deadline)
            return volume

    def destroy(self, pool: str, name: str, *, deadline: Deadline) -> None:
        try:
            self._change("vol_destroy", deadline, pool=pool, name=name)
        except RpcError as error:
            if error.code == EXPORTED and self._luns_of(name, deadline):
                raise VolumeInUse(f"{self._rpc.host}: volume {name} is exported") from error
            if error.code != VOLUME_NOT_FOUND:
                raise

    def resize(self, pool: str, name: str, size: int, *, deadline: Deadline) -> Volume:
        volume = self._find(pool, name, deadline)
        if volume is None:
            raise ProvisioningFailed(f"{self._rpc.host}: volume {name} is not in pool {pool}")
        if volume.size >= size:
            # targetd calls it an invalid argument.
            return volume
        try:
            self._change("vol_resize", deadline, pool=pool, name=name, size=size)
        except RpcError as error:
            if _is_full(error):
                raise Infeasible(str(error)) from error
            raise
        volume = self._find(pool, name, deadline)
        if volume is None or volume.size < size:
            raise ProvisioningFailed(f"{self._rpc.host}: volume {name} has not grown")
        return volume

    def export(self, pool: str, name: str, access: Access, *, deadline: Deadline) -> Target:
        with self._exporting:
            lun = self._take_lun(pool, name, set(access.initiators), deadline)
        if access.chap is not None:
            self._authenticate(sorted(access.initiators), access.chap, deadline)
        return Target(iqn=access.iqn or self._iqn, lun=lun)

    def unexport(self, pool: str, name: str, *, deadline: Deadline) -> None:
        for entry in self._export_list(deadline):
            if entry["vol_name"] == name:
                self._withdraw(entry["pool"] or pool, name, entry["initiator_wwn"], deadline)

    def set_auth(self, pool: str, name: str, access: Access, *, deadline: Deadline) -> None:
        self._authenticate(sorted(access.initiators), access.chap, deadline)

    def check(self, deadline: Deadline) -> list[Finding]:
        try:
            pools = self.pools(deadline)
        except ProvisionerError as error:
            return [Finding(Grade.BAD, str(error), "see the log of targetd on the host")]
        found = [Finding(Grade.GOOD, "targetd answers")]
        for pool in pools:
            free = f"{pool.free >> 20} MiB of {pool.size >> 20} MiB are free"
            found.append(Finding(Grade.GOOD, f"pool {pool.name}: {free}"))
        try:
            used = len({entry["lun"] for entry in self._export_list(deadline)})
        except ProvisionerError as error:
            advice = "remove that LUN with targetcli, or add its volume group to block_pools"
            return [*found, Finding(Grade.BAD, str(error), advice)]
        text = f"{used} of {self._max_lun + 1} LUNs are used"
        return [*found, Finding(Grade.GOOD, text), Finding(Grade.WARNING, CHAP_OFF)]

    # -- exports

    def _take_lun(self, pool: str, name: str, wanted: set[str], deadline: Deadline) -> int:
        """Export under one LUN to all of ``wanted``; another process may be doing the same."""
        for _ in range(_LUN_TRIES):
            entries = self._export_list(deadline)
            mine = {e["initiator_wwn"]: int(e["lun"]) for e in entries if e["vol_name"] == name}
            lun = self._choose(entries, name, set(mine.values()))
            try:
                for initiator in sorted(wanted - set(mine)):
                    args = {"pool": pool, "vol": name, "initiator_wwn": initiator, "lun": lun}
                    self._change("export_create", deadline, **args)
                for initiator in sorted(set(mine) - wanted):
                    self._withdraw(pool, name, initiator, deadline)
            except RpcError as error:
                if error.code != OTHER or not self._was_taken(name, lun, deadline):
                    raise
                log.info("a LUN was taken by another", volume=name, lun=lun)
            if self._has_all(name, lun, wanted, deadline):
                return lun
            self.unexport(pool, name, deadline=deadline)
        raise ProvisioningFailed(
            f"{self._rpc.host}: no LUN for volume {name}: others took it {_LUN_TRIES} times"
        )

    def _choose(self, entries: Iterable[dict[str, Any]], name: str, mine: set[int]) -> int:
        if len(mine) == 1:
            return next(iter(mine))
        # Of any initiator: a volume has the same LUN for all.
        used = {int(entry["lun"]) for entry in entries if entry["vol_name"] != name}
        for lun in range(self._max_lun + 1):
            if lun not in used:
                return lun
        raise Infeasible(f"{self._rpc.host}: all {self._max_lun + 1} LUNs of the target are used")

    def _was_taken(self, name: str, lun: int, deadline: Deadline) -> bool:
        entries = self._export_list(deadline)
        return any(int(e["lun"]) == lun and e["vol_name"] != name for e in entries)

    def _has_all(self, name: str, lun: int, wanted: set[str], deadline: Deadline) -> bool:
        entries = self._export_list(deadline)
        mine = {(e["initiator_wwn"], int(e["lun"])) for e in entries if e["vol_name"] == name}
        return mine == {(initiator, lun) for initiator in wanted}

    def _withdraw(self, pool: str, name: str, initiator: str, deadline: Deadline) -> None:
        args = {"pool": pool, "vol": name, "initiator_wwn": initiator}
        try:
            self._change("export_destroy", deadline, **args)
        except RpcError as error:
            if error.code != EXPORT_NOT_FOUND:
                raise

    def _authenticate(
        self, initiators: Iterable[str], chap: Chap | None, deadline: Deadline
    ) -> None:
        """targetd's "in" is what the initiator shows; a direction with nulls is cleared."""
        credentials = {
            "in_user": chap.user if chap else None,
            "in_pass": chap.password if chap else None,
            "out_user": (chap.mutual_user or None) if chap else None,
            "out_pass": (chap.mutual_password or None) if chap else None,
        }
        for initiator in initiators:
            args = {"initiator_wwn": initiator, **credentials}
            self._change("initiator_set_auth", deadline, **args)

    def _luns_of(self, name: str, deadline: Deadline) -> set[int]:
        entries = self._export_list(deadline)
        return {int(entry["lun"]) for entry in entries if entry["vol_name"] == name}

    def _export_list(self, deadline: Deadline) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = self._read("export_list", deadline)
        except RpcError as error:
            if error.code == INVALID_POOL:
                text = "targetd cannot list its exports: one of its LUNs is outside its pools"
                raise ProvisioningFailed(f"{self._rpc.host}: {text} ({error.code})") from error
            raise
        return found

    # -- volumes

    def _volumes(self, pool: str, deadline: Deadline) -> list[Volume]:
        return [
            Volume(pool=pool, name=entry["name"], size=int(entry["size"]))
            for entry in self._read("vol_list", deadline, pool=pool)
        ]

    def _find(self, pool: str, name: str, deadline: Deadline) -> Volume | None:
        volumes = self._volumes(pool, deadline)
        return next((volume for volume in volumes if volume.name == name), None)

    def _remove_thick(self, pool: str, name: str, deadline: Deadline) -> NoReturn:
        """A thin pool that is full: targetd has made a thick volume that it cannot see itself."""
        group = pool.partition("/")[0]
        if group != pool:
            self.destroy(group, name, deadline=deadline)
        raise Infeasible(
            f"{self._rpc.host}: targetd made volume {name} not in pool {pool} but beside it; it "
            "was removed. Most likely the thin pool is full"
        )

    # -- calls

    def _read(self, method: str, deadline: Deadline, **params: object) -> Any:  # noqa: ANN401
        return self._rpc.call(method, deadline, changes=False, **params)

    def _change(self, method: str, deadline: Deadline, **params: object) -> None:
        self._rpc.call(method, deadline, changes=True, **params)


def _is_full(error: RpcError) -> bool:
    text = str(error).lower()
    return any(part in text for part in ("insufficient", "not enough", "no space", "out of space"))
