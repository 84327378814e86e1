"""All storage hosts together: which one a claim goes to, and which one a volume is on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from external_storage import Deadline, Infeasible, Owner, PersistentVolume, ProvisioningFailed
from external_storage.kube.quantity import from_bytes
from iscsi_targetd_provisioner.backend import Pool
from iscsi_targetd_provisioner.observing import Observations
from iscsi_targetd_provisioner.rpc import Account
from iscsi_targetd_provisioner.servers import (
    BadServers,
    LioConfig,
    Server,
    ServerConfig,
    TargetdConfig,
    build_targetd,
    read_servers,
    server_of,
)
from iscsi_targetd_provisioner.settings import IscsiTargetdParameters, IscsiTargetdSettings

FLAGS_SERVER = "default"
"""Name of the targetd that the flags describe."""

ANN_SERVER = "iscsi.external-storage.dev/server"
ANN_POOL = "iscsi.external-storage.dev/pool"
OLD_POOL = "pool"
OLD_NAME = "volume_name"
OLD_INITIATORS = "initiators"
"""The original's annotations: without a domain, and read by nobody else."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a volume is, or will be."""

    server: Server
    pool: str


@dataclass(frozen=True, slots=True)
class Fleet:
    """The servers by name."""

    servers: Mapping[str, Server]
    default: str
    """Where the original's volumes are; empty: nobody knows."""

    def close(self) -> None:
        for server in self.servers.values():
            server.backend.close()

    def place_of(self, volume: PersistentVolume) -> Place:
        """Where a volume is, by its annotations. Raises ``ProvisioningFailed``."""
        notes = volume.metadata.annotations
        name = notes.get(ANN_SERVER) or self.default
        pool = notes.get(ANN_POOL) or notes.get(OLD_POOL)
        if volume.spec.iscsi is None or not name or not pool:
            text = "is no iSCSI volume with annotations that say its server and pool"
            raise ProvisioningFailed(f"volume {volume.name} {text}: it is left alone")
        if notes.get(OLD_NAME, volume.name) != volume.name:
            raise ProvisioningFailed(
                f"annotation {OLD_NAME} says {notes[OLD_NAME]}, not {volume.name}: it is left alone"
            )
        if name not in self.servers:
            raise ProvisioningFailed(f"server {name} of volume {volume.name} is not configured")
        return Place(self.servers[name], pool)

    def choose(
        self, name: str, size: int, asked: IscsiTargetdParameters, deadline: Deadline
    ) -> Place:
        """Where a claim's volume goes: where it is already, else where there is most space.

        Raises ``Infeasible`` when no pool has enough, ``Unchanged`` when a server that might have
        the volume already cannot be asked.
        """
        servers = self._candidates(asked)
        if asked.wanted_pool:
            may = [server for server in servers if server.backend.may_use(asked.wanted_pool)]
            if not may:
                names = ", ".join(server.name for server in servers)
                raise Infeasible(f"pool {asked.wanted_pool} is not one that {names} may use")
        if len(servers) == 1 and (only := _only_pool(servers[0], asked)):
            # To be told that it is too small is for the call that fills it.
            return Place(servers[0], only)
        pools = self.pools(asked, deadline)
        best = max(pools, key=lambda entry: entry[1].free, default=None)
        # With one pool, what is there is found when it is made again, unless it has filled it.
        if len(pools) > 1 or (best is not None and best[1].free < size):
            found = self.find(name, asked, deadline)
            known = {(server.name, pool.name) for server, pool in pools}
            for place in found:
                if (place.server.name, place.pool) not in known:
                    text = f"an earlier try has left volume {name} in {place.pool}"
                    raise ProvisioningFailed(f"{text}, which is none of the class's pools")
            if found:
                return found[0]
        if best is None:
            raise Infeasible(f"no server has a pool {_wish(asked)}")
        if best[1].free < size:
            raise Infeasible(
                f"too little space: {from_bytes(size)} are asked for, pool {best[1].name} of "
                f"server {best[0].name} has {from_bytes(best[1].free)} left, and no other has more"
            )
        return Place(best[0], best[1].name)

    def pools(self, asked: IscsiTargetdParameters, deadline: Deadline) -> list[tuple[Server, Pool]]:
        """All pools that a class may use."""
        return [
            (server, pool)
            for server in self._candidates(asked)
            for pool in server.backend.pools(deadline)
            if asked.wanted_pool in ("", pool.name) and asked.thin in (None, pool.thin)
        ]

    def _candidates(self, asked: IscsiTargetdParameters) -> Sequence[Server]:
        if (
            asked.wanted_pool
            and asked.thin is not None
            and asked.thin != ("/" in asked.wanted_pool)
        ):
            raise Infeasible(f"pool {asked.wanted_pool} is not {_wish(asked)}")
        if not asked.server:
            return list(self.servers.values())
        if asked.server not in self.servers:
            known = ", ".join(sorted(self.servers))
            raise Infeasible(f"server {asked.server} is not configured; there is: {known}")
        return [self.servers[asked.server]]

    def find(self, name: str, asked: IscsiTargetdParameters, deadline: Deadline) -> list[Place]:
        """Where there is a volume of this name; ``Unchanged`` when a server cannot be asked."""
        return [
            Place(server, volume.pool)
            for server in self._candidates(asked)
            for volume in server.backend.find(name, deadline)
        ]


def _only_pool(server: Server, asked: IscsiTargetdParameters) -> str:
    """The pool if there is nothing to choose; empty if the host has to be asked."""
    if asked.wanted_pool:
        return asked.wanted_pool
    only, *others = server.backend.configured_pools or [""]
    return only if not others and asked.thin in (None, "/" in only) else ""


def _wish(asked: IscsiTargetdParameters) -> str:
    kind = {None: "", True: "thin ", False: "thick "}[asked.thin]
    return f"{kind}{asked.wanted_pool}".strip() or "at all"


def build_fleet(
    settings: IscsiTargetdSettings, observations: Observations, *, owner: Callable[[], Owner]
) -> Fleet:
    """The fleet of the settings. Raises ``BadServers``."""
    if settings.servers_file is None:
        config = _config_of_flags(settings)
        user, password = settings.targetd_username, settings.targetd_password
        account = Account(user=lambda: user, password=lambda: password)
        observer = observations.of(FLAGS_SERVER)
        backend = build_targetd(FLAGS_SERVER, config, account, observer)
        return Fleet({FLAGS_SERVER: server_of(FLAGS_SERVER, config, backend)}, FLAGS_SERVER)
    configs = read_servers(settings.servers_file)
    servers = {
        name: server_of(name, config, config.build(name, owner, observations.of(name)))
        for name, config in configs.items()
    }
    return Fleet(servers, _default(settings.default_server, configs))


def _config_of_flags(settings: IscsiTargetdSettings) -> TargetdConfig:
    host = settings.targetd_address
    host = f"[{host}]" if ":" in host else host
    ca_file = settings.targetd_ca_file
    config = TargetdConfig(
        url=f"{settings.targetd_scheme or 'http'}://{host}:{settings.targetd_port}",
        username_file="",
        password_file="",
        ca_file=str(ca_file) if ca_file is not None else "",
        allow_plain_http=settings.targetd_scheme == "http",
    )
    problems = list(config.problems())
    if problems:
        raise BadServers(
            f"--targetd-address {settings.targetd_address}: {problems[0]}; set --targetd-scheme to "
            "https, or to http if that is meant"
        )
    return config


def _default(named: str, configs: Mapping[str, ServerConfig]) -> str:
    if named and (named not in configs or isinstance(configs[named], LioConfig)):
        raise BadServers(f"--default-server: {named!r} is not a targetd of the configuration")
    daemons = [name for name, config in configs.items() if isinstance(config, TargetdConfig)]
    return named or (daemons[0] if len(daemons) == 1 else "")
