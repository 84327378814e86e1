"""The targetd backend: one target for all volumes, a LUN for each, over JSON-RPC.

targetd has no lock between looking for a free LUN and taking it, no idempotence, and says what it
does not like in a handful of codes: a state that is the wanted one is a success, whatever its code.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence
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
    tells_sessions = False

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

    @property
    def configured_pools(self) -> Collection[str]:
        return self._pools

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

    def find(self, name: str, deadline: Deadline) -> list[Volume]:
        pools = self._pools or [pool.name for pool in self.pools(deadline)]
        # The groups too: a thin volume that became a thick one is in no list of its pool.
        places = dict.fromkeys([*pools, *map(_group_of, pools)])
        return [v for place in places for v in self._volumes(place, deadline) if v.name == name]

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
        self._must_use(pool)
        # What cannot be listed cannot be exported either: better now than with a volume made.
        self._export_list(deadline)
        try:
            self._change("vol_create", deadline, pool=pool, name=name, size=size)
        except RpcError as error:
            if error.code == OTHER and _is_full(error):
                raise Infeasible(str(error)) from error
            # What an earlier try has made beside the pool is told with a code that says nothing.
            beside = error.code == OTHER and self._is_beside(pool, name, deadline)
            if error.code != NAME_CONFLICT and not beside:
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
        self._must_use(pool)
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
            lun = self._take_lun(pool, name, access, deadline)
        if access.chap is not None:
            self._authenticate(sorted(access.initiators), access.chap, deadline)
        return Target(iqn=access.iqn or self._iqn, lun=lun)

    def unexport(self, pool: str, name: str, *, deadline: Deadline) -> None:
        for entry in self._export_list(deadline):
            if entry["vol_name"] == name:
                self._withdraw(entry["pool"] or pool, name, entry["initiator_wwn"], deadline)

    def set_auth(
        self, pool: str, name: str, access: Access, *, deadline: Deadline
    ) -> frozenset[str]:
        self._authenticate(sorted(access.initiators), access.chap, deadline)
        return frozenset()

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

    def _take_lun(self, pool: str, name: str, access: Access, deadline: Deadline) -> int:
        """Export under one LUN to all who may have it; another process may be doing the same."""
        wanted = set(access.initiators)
        for _ in range(_LUN_TRIES):
            entries = self._export_list(deadline)
            mine = {e["initiator_wwn"]: int(e["lun"]) for e in entries if e["vol_name"] == name}
            fixed = self._fixed(name, set(mine.values()), access)
            lun = self._choose(entries, name, access) if fixed is None else fixed
            fresh = sorted(wanted - set(mine))
            try:
                for initiator in fresh:
                    args = {"pool": pool, "vol": name, "initiator_wwn": initiator, "lun": lun}
                    self._change("export_create", deadline, **args)
            except RpcError as error:
                if error.code != OTHER or not self._was_taken(name, lun, deadline):
                    raise
                log.info("a LUN was taken by another", volume=name, lun=lun)
            if self._have_all(name, lun, wanted, deadline):
                for initiator in sorted(set(mine) - wanted):
                    self._withdraw(pool, name, initiator, deadline)
                return lun
            # Only what this call has made: the rest may be in use.
            for initiator in fresh:
                self._withdraw(pool, name, initiator, deadline)
            if fixed is not None:
                text = f"LUN {lun}, by which nodes know volume {name}, is another volume's now"
                raise ProvisioningFailed(f"{self._rpc.host}: {text}: it is left alone")
        raise ProvisioningFailed(
            f"{self._rpc.host}: no LUN for volume {name}: others took it {_LUN_TRIES} times"
        )

    def _fixed(self, name: str, luns: set[int], access: Access) -> int | None:
        """The LUN that the volume has, or had; None if any will do."""
        if access.lun is not None and luns <= {access.lun}:
            return access.lun
        if access.lun is None and len(luns) < 2 and not luns & set(access.avoid):
            return next(iter(luns), None)
        has = ", ".join(map(str, sorted(luns)))
        known = "which nodes know others by" if access.lun is None else f"not {access.lun}"
        text = f"volume {name} is exported under LUN {has}, {known}: it is left alone"
        raise ProvisioningFailed(f"{self._rpc.host}: {text}")

    def _choose(self, entries: Iterable[dict[str, Any]], name: str, access: Access) -> int:
        # Of any initiator: a volume has the same LUN for all. What nodes know another volume by is
        # not free while that one's export is lost.
        used = {int(entry["lun"]) for entry in entries if entry["vol_name"] != name}
        for lun in range(self._max_lun + 1):
            if lun not in used and lun not in access.avoid:
                return lun
        raise Infeasible(f"{self._rpc.host}: all {self._max_lun + 1} LUNs of the target are used")

    def _was_taken(self, name: str, lun: int, deadline: Deadline) -> bool:
        entries = self._export_list(deadline)
        return any(int(e["lun"]) == lun and e["vol_name"] != name for e in entries)

    def _have_all(self, name: str, lun: int, wanted: set[str], deadline: Deadline) -> bool:
        entries = self._export_list(deadline)
        mine = {e["initiator_wwn"]: int(e["lun"]) for e in entries if e["vol_name"] == name}
        return wanted <= set(mine) and set(mine.values()) <= {lun}

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

    def _is_beside(self, pool: str, name: str, deadline: Deadline) -> bool:
        group = _group_of(pool)
        with begun():
            return group != pool and self._find(group, name, deadline) is not None

    def _remove_thick(self, pool: str, name: str, deadline: Deadline) -> NoReturn:
        """A thin pool that is full: targetd has made a thick volume that it cannot see itself."""
        group = _group_of(pool)
        if group == pool:
            raise ProvisioningFailed(f"{self._rpc.host}: volume {name} is not in pool {pool}")
        self.destroy(group, name, deadline=deadline)
        raise Infeasible(
            f"{self._rpc.host}: targetd made volume {name} not in pool {pool} but beside it; it "
            "was removed. Most likely the thin pool is full"
        )

    def _must_use(self, pool: str) -> None:
        if not self.may_use(pool):
            raise ProvisioningFailed(f"{self._rpc.host}: pool {pool} is not configured for us")

    # -- calls

    def _read(self, method: str, deadline: Deadline, **params: object) -> Any:  # noqa: ANN401
        return self._rpc.call(method, deadline, changes=False, **params)

    def _change(self, method: str, deadline: Deadline, **params: object) -> None:
        self._rpc.call(method, deadline, changes=True, **params)


def _group_of(pool: str) -> str:
    return pool.partition("/")[0]


def _is_full(error: RpcError) -> bool:
    text = str(error).lower()
    return any(part in text for part in ("insufficient", "not enough", "no space", "out of space"))
