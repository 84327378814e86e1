"""The lio-ssh backend: LVM and LIO of any Linux host, over SSH."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from external_storage import Deadline, Infeasible, Owner, ProvisionerError, ProvisioningFailed
from iscsi_targetd_provisioner.backend import (
    Access,
    Backend,
    Export,
    Finding,
    Grade,
    Pool,
    Target,
    Volume,
)
from iscsi_targetd_provisioner.chap import Chap
from iscsi_targetd_provisioner.helper_session import Helper, HelperRefused
from iscsi_targetd_provisioner.names import MAX_NAME, Portal
from iscsi_targetd_provisioner.observing import Observer, unobserved
from iscsi_targetd_provisioner.ssh import Connection, Login


class LioSsh(Backend):
    """One target per volume, named after it, with LUN 0."""

    def __init__(
        self,
        name: str,
        login: Login,
        *,
        owner: Callable[[], Owner] | str,
        iqn: str,
        pools: Mapping[str, float],
        listen: tuple[Portal, ...] = (),
        portals: tuple[Portal, ...] = (),
        sudo: bool = False,
        installed: bool = False,
        observe: Observer = unobserved,
    ) -> None:
        """
        Args:
            owner: what our logical volumes are tagged with, or who tells; asked when it is needed.
            iqn: what the names of targets begin with.
            pools: by name, how many times its size a thin pool may promise.
            listen: what targets listen on, if it is not what nodes are told.
            portals: what nodes are told, unless their class says otherwise.
        """
        self.name = name
        self._owner = owner
        self._iqn = iqn
        self._pools = pools
        self._listen = listen
        self._portals = portals
        self._connection = Connection(login)
        self._helper = Helper(
            open_channel=self._connection.channel,
            host=f"{name} ({login})",
            sudo=sudo,
            installed=installed,
            observe=observe,
        )

    @property
    def configured_pools(self) -> Collection[str]:
        return self._pools

    def pools(self, deadline: Deadline) -> list[Pool]:
        found = self._ask("pools", {"pools": list(self._pools.items())}, deadline)
        return [Pool(**entry) for entry in found]

    def volumes(self, deadline: Deadline) -> list[Volume]:
        found = self._ask("volumes", {"owner": self._owners()}, deadline)
        volumes = (Volume(**entry) for entry in found)
        return [volume for volume in volumes if volume.pool in self._pools]

    def exports(self, deadline: Deadline) -> list[Export]:
        pools = {volume.name: volume.pool for volume in self.volumes(deadline)}
        return [
            Export(
                volume=entry["name"],
                pool=pools[entry["name"]],
                target=Target(iqn=entry["iqn"], lun=entry["lun"]),
                initiators=frozenset(entry["initiators"]),
                logged_in=frozenset(entry["sessions"]),
            )
            for entry in self._ask("exports", {}, deadline)
            if entry["name"] in pools
        ]

    def create(self, pool: str, name: str, size: int, *, deadline: Deadline) -> Volume:
        self._must_use(pool)
        args = {**self._volume(pool, name), "size": size, "overcommit": self._overcommit(pool)}
        return Volume(pool=pool, name=name, size=self._ask("create", args, deadline))

    def destroy(self, pool: str, name: str, *, deadline: Deadline) -> None:
        self._ask("destroy", self._volume(pool, name), deadline)

    def resize(self, pool: str, name: str, size: int, *, deadline: Deadline) -> Volume:
        self._must_use(pool)
        args = {**self._volume(pool, name), "size": size, "overcommit": self._overcommit(pool)}
        return Volume(pool=pool, name=name, size=self._ask("resize", args, deadline))

    def export(self, pool: str, name: str, access: Access, *, deadline: Deadline) -> Target:
        args = {
            **self._volume(pool, name),
            "iqn": self._target_name(name, access),
            "portals": [(portal.host, portal.port) for portal in self._listen or access.portals],
            "initiators": sorted(access.initiators),
            "chap": _chap(access.chap),
        }
        found = self._ask("export", args, deadline)
        return Target(iqn=found["iqn"], lun=0, refused=frozenset(found["refused"]))

    def unexport(self, pool: str, name: str, *, deadline: Deadline) -> None:
        args = {**self._volume(pool, name), "iqn": self._target_name(name, None)}
        self._ask("unexport", args, deadline)

    def set_auth(
        self, pool: str, name: str, access: Access, *, deadline: Deadline
    ) -> frozenset[str]:
        args = {**self._volume(pool, name), "chap": _chap(access.chap)}
        return frozenset(self._ask("set_auth", args, deadline))

    def check(self, deadline: Deadline) -> list[Finding]:
        portals = [(portal.host, portal.port) for portal in self._listen or self._portals]
        try:
            args = {"pools": list(self._pools.items()), "portals": portals}
            found = self._ask("diagnose", args, deadline)
        except HelperRefused as error:
            return [Finding(Grade.BAD, str(error))]
        except ProvisionerError as error:
            return [Finding(Grade.BAD, str(error), "see the log of sshd on the host")]
        reached = Finding(Grade.GOOD, "reached over SSH, and the helper runs")
        return [reached, *(Finding(Grade(grade), *rest) for grade, *rest in found)]

    def check_access(self, name: str, access: Access) -> None:
        target = self._target_name(name, access)
        if len(target.encode()) > MAX_NAME:
            raise Infeasible(f"target name {target} is longer than {MAX_NAME} bytes")
        bad = [portal for portal in self._listen or access.portals if not portal.is_address]
        if bad:
            text = f"server {self.name} cannot listen on {bad[0].host}, which is a name"
            raise Infeasible(f"{text}: give its configuration the addresses to listen on")

    def close(self) -> None:
        self._helper.close()
        self._connection.close()

    def _ask(self, op: str, args: dict[str, Any], deadline: Deadline) -> Any:  # noqa: ANN401
        return self._helper.request(op, args, deadline)

    def _volume(self, pool: str, name: str) -> dict[str, Any]:
        return {"pool": pool, "name": name, "owner": self._owners()}

    def _owners(self) -> list[str]:
        """With the name of the cluster: another one may use the same host."""
        if isinstance(self._owner, str):
            return [self._owner]
        owner = self._owner()
        return [f"{owner.cluster}/{name}" for name in owner.names]

    def _must_use(self, pool: str) -> None:
        if not self.may_use(pool):
            raise ProvisioningFailed(f"{self.name}: pool {pool} is not configured for us")

    def _overcommit(self, pool: str) -> float:
        return self._pools.get(pool, 1.0)

    def _target_name(self, volume: str, access: Access | None) -> str:
        prefix = access.iqn if access is not None and access.iqn else self._iqn
        return f"{prefix}:{volume}".lower()


def _chap(chap: Chap | None) -> dict[str, str] | None:
    if chap is None:
        return None
    return {
        "userid": chap.user,
        "password": chap.password,
        "mutual_userid": chap.mutual_user,
        "mutual_password": chap.mutual_password,
    }
