"""What an admin sets, and what a class may say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from external_storage import Parameters, Seconds, Settings
from iscsi_targetd_provisioner.names import Portal, iqn_problem, is_pool_name

_WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


class IscsiTargetdSettings(Settings):
    """Flags and environment, beside those of every provisioner."""

    servers_file: Path | None = None
    """YAML file with the storage hosts. Without it, the one targetd of the flags below is used,
    under the name `default`."""

    default_server: str = ""
    """Server of volumes that do not say theirs: those of the original provisioner. By default the
    only targetd there is."""

    targetd_scheme: str = ""
    """`https`, or `http` to allow that the password can be read on the way. Needed unless targetd
    is on a loopback address."""

    targetd_address: str = "localhost"
    """Host of the targetd."""

    targetd_port: int = 18700
    """TCP port of the targetd."""

    targetd_username: str = "admin"
    """User name of the targetd."""

    targetd_password: str = dataclasses.field(default="", repr=False)
    """Password of the targetd. Give it in the environment: everybody on the node can read flags."""

    targetd_ca_file: Path | None = None
    """CA that signed the targetd's certificate, in place of the system's."""

    default_fs: str = "xfs"
    """File system of volumes whose class has no `fsType`."""

    session_chap_credential_file_path: Path = Path(
        "/var/run/secrets/iscsi-provisioner/session-chap-credential.properties"
    )
    """CHAP credentials as the original reads them, for classes without `chapSecretName`; pods then
    need the Secret `<provisioner name>-chap-secret` in their own namespace."""

    reconcile_interval: Seconds = Seconds(60.0)
    """How often exports are compared with the nodes there are, and CHAP Secrets with what was set;
    a new node is seen at once."""

    withdraw_after: Seconds = Seconds(600.0)
    """How long a node that is gone, or that its class no longer names, keeps its access to a
    volume that it is not logged in to. On a targetd, which does not tell who is, it keeps it."""

    def validate(self) -> Iterable[str]:
        yield from super().validate()
        if self.targetd_scheme not in ("", "http", "https"):
            yield f"--targetd-scheme: {self.targetd_scheme!r} is not http or https"
        if not 0 < self.targetd_port < 65536:
            yield f"--targetd-port: {self.targetd_port} is not between 1 and 65535"
        if ":" in self.targetd_username or ":" in self.targetd_password:
            yield "--targetd-username, --targetd-password: targetd takes no ':' in them"
        if not _WORD.fullmatch(self.default_fs):
            yield f"--default-fs: {self.default_fs!r} is not a file system"
        if self.reconcile_interval < 1:
            yield "--reconcile-interval: must be at least 1 s"
        if self.withdraw_after < 0:
            yield "--withdraw-after: must not be below 0"


class IscsiTargetdParameters(Parameters):
    """Parameters of a class of iscsi-targetd-provisioner."""

    server: str = ""
    """Storage host, by its name in the configuration; without it, the one with most free space."""

    pool: str = ""
    """Volume group, or `group/thin-pool`; without it, the server's pool with most free space."""

    volume_group: str = ""
    """The original's word for `pool`."""

    thin: bool | None = None
    """Only thin pools (`true`) or only thick ones (`false`); `none`: either."""

    target_portal: str = ""
    """Address that nodes reach the target by, `HOST`, `HOST:PORT` or `[IPV6]:PORT`; by default the
    server's."""

    portals: tuple[str, ...] = ()
    """More addresses of the target, for multipath."""

    iqn: str = ""
    """Name of the target (targetd), or what names of targets begin with (lio-ssh); by default the
    server's."""

    iscsi_interface: str = ""
    """Interface of the initiator; empty: `default`, TCP."""

    initiators: tuple[str, ...] = ()
    """Names of the initiators that may log in; without it, those of all nodes that have the
    annotation, also of nodes that come later."""

    chap_auth_session: bool = False
    """Whether nodes log in with CHAP."""

    chap_auth_discovery: bool = False
    """Whether nodes use CHAP for discovery too; the host has that for all targets alike."""

    chap_secret_name: str = ""
    """Secret of type `kubernetes.io/iscsi-chap` with the credentials."""

    chap_secret_namespace: str = ""
    """Its namespace; by default the provisioner's own."""

    fs_type: str = ""
    """File system that the kubelet makes; by default the one of `--default-fs`."""

    readonly: bool = False
    """Whether nodes attach the volume read-only."""

    def validate(self) -> Iterable[str]:
        for key, text in (("targetPortal", self.target_portal), *self._portals()):
            yield from _problem(key, text, _portal_problem)
        yield from _problem("iqn", self.iqn, iqn_problem)
        for initiator in self.initiators:
            yield from _problem("initiators", initiator, iqn_problem)
        for key, text in (("pool", self.pool), ("volumeGroup", self.volume_group)):
            if text and not is_pool_name(text):
                yield f"parameter {key!r}: {text!r} is not GROUP or GROUP/THIN-POOL"
        if self.pool and self.volume_group and self.pool != self.volume_group:
            yield "parameter 'pool': volumeGroup says something else; give one of them"
        if self.portals and not self.target_portal:
            yield "parameter 'portals': needs targetPortal beside it"
        for key, text in (
            ("chapSecretName", self.chap_secret_name),
            ("chapSecretNamespace", self.chap_secret_namespace),
        ):
            if text and not _LABEL.fullmatch(text):
                yield f"parameter {key!r}: {text!r} is not a name of Kubernetes"
        if self.chap_secret_namespace and not self.chap_secret_name:
            yield "parameter 'chapSecretNamespace': needs chapSecretName beside it"
        if self.chap_secret_name and not (self.chap_auth_session or self.chap_auth_discovery):
            yield "parameter 'chapSecretName': has no effect without chapAuthSession"
        if self.fs_type and not _WORD.fullmatch(self.fs_type):
            yield f"parameter 'fsType': {self.fs_type!r} is not a file system"

    def _portals(self) -> list[tuple[str, str]]:
        return [("portals", text) for text in self.portals]

    @property
    def wanted_pool(self) -> str:
        return self.pool or self.volume_group


def _problem(key: str, text: str, find: Callable[[str], str | None]) -> Iterable[str]:
    found = find(text) if text else None
    if found is not None:
        yield f"parameter {key!r}: {found}"


def _portal_problem(text: str) -> str | None:
    try:
        Portal.parse(text)
    except ValueError as error:
        return str(error)
    return None
