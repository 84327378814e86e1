"""The storage hosts: from the admin's configuration to backends."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec
import yaml

from external_storage import CannotStart, Deadline, Owner
from iscsi_targetd_provisioner import rpc
from iscsi_targetd_provisioner.backend import Backend
from iscsi_targetd_provisioner.lio_ssh import LioSsh
from iscsi_targetd_provisioner.names import Portal, iqn_problem, is_pool_name
from iscsi_targetd_provisioner.observing import Observer
from iscsi_targetd_provisioner.ssh import Connection, Login
from iscsi_targetd_provisioner.targetd import Targetd

_MAX_LUN = 255
"""Beyond it, the kubelet and udev write the number of a LUN in different ways."""


class _Config(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """Base: keys in camelCase, unknown ones are refused."""


class SshConfig(_Config, frozen=True, kw_only=True):
    """How to log in to a host. Files: read for each connection, so they can be replaced."""

    host: str
    known_hosts: str
    """Lines of all key types that the host has (``ssh-keyscan``, compared on the host itself)."""
    port: int = 22
    user: str = "root"
    key_file: str = ""
    key_passphrase_file: str = ""
    password_file: str = ""

    def login(self) -> Login:
        return Login(
            host=self.host,
            port=self.port,
            user=self.user,
            known_hosts=Path(self.known_hosts),
            key_file=_path(self.key_file),
            key_passphrase_file=_path(self.key_passphrase_file),
            password_file=_path(self.password_file),
        )

    def problems(self) -> Iterable[str]:
        if not self.key_file and not self.password_file:
            yield "ssh: keyFile or passwordFile must be given"


class PoolConfig(_Config, frozen=True, kw_only=True):
    name: str
    overcommit: float = 1.0
    """How many times its size a thin pool may promise to volumes."""


class _ServerConfig(_Config, frozen=True, kw_only=True, tag_field="type"):
    """What servers of both kinds have."""

    iqn: str = ""
    portals: list[str] = []
    """What nodes reach its targets by, unless the class says so."""

    def common_problems(self) -> Iterable[str]:
        if self.iqn and (problem := iqn_problem(self.iqn)):
            yield f"iqn: {problem}"
        yield from _portal_problems("portals", self.portals)


class TargetdConfig(_ServerConfig, frozen=True, kw_only=True, tag="targetd"):
    """A targetd; ``iqn`` is the name of its one target."""

    url: str
    username_file: str
    password_file: str
    ca_file: str = ""
    """Whom to trust besides; empty: the system's authorities."""
    allow_plain_http: bool = False
    tunnel: SshConfig | None = None
    """Reach it through SSH; ``url`` is then seen from over there."""
    pools: list[str] = []
    """Those that may be used; none: all."""
    max_lun: int = 255

    def problems(self) -> Iterable[str]:
        yield from self.common_problems()
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            yield f"url: {self.url!r} is not http://HOST:PORT or https://HOST:PORT"
        elif parts.scheme == "https" and self.tunnel is not None:
            yield "url: through a tunnel it is http://, SSH does the encryption"
        elif parts.scheme == "http" and not (
            self.tunnel is not None or self.allow_plain_http or _is_loopback(parts.hostname)
        ):
            yield (
                "url: http:// shows the password to everybody on the way: use https://, a tunnel, "
                "or allowPlainHttp: true"
            )
        yield from self.tunnel.problems() if self.tunnel is not None else ()
        yield from (f"pools: {n!r} is not a pool" for n in self.pools if not is_pool_name(n))
        if not 0 <= self.max_lun <= _MAX_LUN:
            yield f"maxLun: {self.max_lun} is not between 0 and {_MAX_LUN}"

    def build(self, name: str, owner: Callable[[], Owner], observe: Observer) -> Backend:
        account = rpc.Account.from_files(Path(self.username_file), Path(self.password_file))
        return build_targetd(name, self, account, observe)


class LioConfig(_ServerConfig, frozen=True, kw_only=True, tag="lio-ssh"):
    """A Linux host with LVM and LIO; names of targets begin with ``iqn``."""

    ssh: SshConfig
    pools: list[str | PoolConfig]
    sudo: bool = False
    helper: Literal["sent", "installed"] = "sent"
    listen: list[str] = []
    """Addresses of the host that targets listen on, if they are not the ``portals``."""

    def problems(self) -> Iterable[str]:
        yield from self.common_problems()
        yield from self.ssh.problems()
        yield from _portal_problems("listen", self.listen)
        yield from self._listen_problems()
        if not self.iqn:
            yield "iqn: must be given, such as iqn.2026-01.com.example:storage1"
        if not self.pools:
            yield "pools: must name a volume group, or group/thin-pool"
        for pool in self.pool_factors():
            if not is_pool_name(pool):
                yield f"pools: {pool!r} is not GROUP or GROUP/THIN-POOL"
        for pool, factor in self.pool_factors().items():
            if factor < 1.0:
                yield f"pools: overcommit of {pool} is {factor:g}, below 1"

    def _listen_problems(self) -> Iterable[str]:
        for text in self.listen or self.portals:
            # What is no portal at all is told already.
            if not list(_portal_problems("", [text])) and not Portal.parse(text).is_address:
                yield f"listen: must be given, with addresses: LIO cannot listen on {text}"

    def pool_factors(self) -> dict[str, float]:
        entries = (PoolConfig(name=p) if isinstance(p, str) else p for p in self.pools)
        return {entry.name: entry.overcommit for entry in entries}

    def build(self, name: str, owner: Callable[[], Owner], observe: Observer) -> Backend:
        return LioSsh(
            name,
            self.ssh.login(),
            owner=owner,
            iqn=self.iqn,
            pools=self.pool_factors(),
            listen=tuple(Portal.parse(text) for text in self.listen),
            portals=tuple(Portal.parse(text) for text in self.portals),
            sudo=self.sudo,
            installed=self.helper == "installed",
            observe=observe,
        )


ServerConfig = TargetdConfig | LioConfig


class ServersFile(_Config, frozen=True, kw_only=True):
    """The whole file."""

    servers: dict[str, ServerConfig]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A storage host that is ready to be used."""

    name: str
    backend: Backend
    iqn: str
    portals: tuple[Portal, ...]


class BadServers(CannotStart):
    """What is wrong with the configuration, all of it."""


def read_servers(path: Path) -> Mapping[str, ServerConfig]:
    """Raises ``BadServers``."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        parsed = msgspec.convert(content, ServersFile)
    except OSError as error:
        raise BadServers(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadServers(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    except msgspec.ValidationError as error:
        raise BadServers(f"{path}: {error}") from error
    problems = [
        f"server {name}: {problem}"
        for name, config in parsed.servers.items()
        for problem in config.problems()
    ]
    if not parsed.servers:
        problems.append("servers: there is none")
    if problems:
        raise BadServers(f"{path}: {'; '.join(problems)}")
    return parsed.servers


def server_of(name: str, config: ServerConfig, backend: Backend) -> Server:
    portals = tuple(Portal.parse(text) for text in config.portals)
    return Server(name=name, backend=backend, iqn=config.iqn, portals=portals)


def build_targetd(
    name: str, config: TargetdConfig, account: rpc.Account, observe: Observer
) -> Targetd:
    """Raises ``BadServers`` for a CA file that cannot be used."""
    parts = urlsplit(config.url)
    host, port = parts.hostname or "", parts.port or rpc.PORT
    client = rpc.Rpc(
        host=f"{name} ({parts.scheme}://{parts.netloc})",
        account=account,
        open_stream=_opener(config, host, port),
        observe=observe,
    )
    return Targetd(name, client, iqn=config.iqn, pools=config.pools, max_lun=config.max_lun)


def _opener(config: TargetdConfig, host: str, port: int) -> rpc.Opener:
    if config.tunnel is not None:
        connection = Connection(config.tunnel.login())

        def through(deadline: Deadline) -> rpc.Stream:
            return connection.tunnel(deadline, (host, port))

        return through
    context = None
    if urlsplit(config.url).scheme == "https":
        try:
            context = ssl.create_default_context(cafile=config.ca_file or None)
        except OSError as error:
            raise BadServers(f"caFile {config.ca_file}: {error.strerror or error}") from error
    return rpc.connect(host, port, context=context)


def _portal_problems(key: str, texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        try:
            Portal.parse(text)
        except ValueError as error:
            yield f"{key}: {error}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _path(text: str) -> Path | None:
    return Path(text) if text else None
