"""Where the API server is and how we prove who we are.

In a pod the address, the CA and the token are read here, without the ``kubernetes`` package: it
costs 44 MiB and 0.2 s. A kubeconfig goes through that package, imported only then, because exec
plugins, OIDC and the merging of several files are its field and not ours.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from external_storage.kube.errors import ConfigError

if TYPE_CHECKING:
    from kubernetes.client import Configuration

SERVICE_ACCOUNT_DIR = Path("/var/run/secrets/kubernetes.io/serviceaccount")

# The kubelet replaces a projected token when 80 % of its life (an hour, often less) has passed.
_TOKEN_MAX_AGE_S = 60.0
# Asking the official client costs more than a request; it looks at the expiry when it is asked.
_KUBECONFIG_MAX_AGE_S = 5.0


class TokenSource(Protocol):
    """Gives the bearer token of the next request."""

    def token(self) -> str | None:
        """The token, or None for a connection that is authenticated by its certificate."""

    def refresh(self) -> None:
        """Forget what is cached: the server has refused it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How to reach one API server."""

    server: str
    """Base address, such as ``https://10.96.0.1:443``; no trailing slash."""
    tokens: TokenSource
    ca_file: Path | None = None
    """PEM bundle the server's certificate is checked against; None: the system's."""
    cert_file: Path | None = None
    key_file: Path | None = None
    verify: bool = True
    proxy: str | None = None
    namespace: str = "default"
    """Our own namespace: leases and events without a namespace of their own go there."""


class NoToken:
    """For connections authenticated by a client certificate, or not at all."""

    def token(self) -> str | None:
        return None

    def refresh(self) -> None:
        return None


class FileToken:
    """A token in a file that somebody else keeps fresh: read again every minute and after a 401."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._token = ""
        self._read_at: float | None = None

    def token(self) -> str:
        now = self._clock()
        with self._lock:
            if self._read_at is None or now - self._read_at >= _TOKEN_MAX_AGE_S:
                self._read(now)
            return self._token

    def refresh(self) -> None:
        with self._lock:
            self._read_at = None

    def _read(self, now: float) -> None:
        try:
            token = self._path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            token, why = "", str(error)
        else:
            why = "empty"
        # Without a new one, the last token is likely still good; the server says so if it is not.
        self._token, self._read_at = token or self._token, now
        if not self._token:
            self._read_at = None
            raise ConfigError(f"token file {self._path}: {why}")


def load(
    *,
    kubeconfig: str | None = None,
    master: str | None = None,
    environ: Mapping[str, str] = os.environ,
    service_account_dir: Path = SERVICE_ACCOUNT_DIR,
) -> ClientConfig:
    """Find the API server: an explicit kubeconfig, the pod's own credentials, ``~/.kube/config``.

    Args:
        kubeconfig: path of a kubeconfig; several may be joined by ``:`` as in ``$KUBECONFIG``.
        master: address to use in place of the one found.

    Raises:
        ConfigError: nothing usable was found, or what was found is broken.
    """
    if kubeconfig:
        return from_kubeconfig(kubeconfig, master=master, environ=environ)
    if "KUBERNETES_SERVICE_HOST" in environ and (service_account_dir / "token").exists():
        config = in_cluster(environ=environ, service_account_dir=service_account_dir)
        return replace(config, server=master.rstrip("/")) if master else config
    default = Path(os.path.expanduser("~/.kube/config"))  # noqa: PTH111 - Path.expanduser may raise
    if default.exists():
        return from_kubeconfig(str(default), master=master, environ=environ)
    if master:
        raise ConfigError(f"--master {master}: credentials are missing, give --kubeconfig too")
    raise ConfigError(
        "no API server: not in a pod (KUBERNETES_SERVICE_HOST and a service account token), "
        "and neither --kubeconfig, KUBECONFIG nor ~/.kube/config is there"
    )


def in_cluster(
    *,
    environ: Mapping[str, str] = os.environ,
    service_account_dir: Path = SERVICE_ACCOUNT_DIR,
) -> ClientConfig:
    """The credentials that the kubelet mounts into every pod."""
    host = environ.get("KUBERNETES_SERVICE_HOST", "")
    port = environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise ConfigError("KUBERNETES_SERVICE_HOST is not set: not in a pod")
    ca_file = service_account_dir / "ca.crt"
    if not ca_file.exists():
        raise ConfigError(f"{ca_file}: missing")
    namespace_file = service_account_dir / "namespace"
    namespace = namespace_file.read_text().strip() if namespace_file.exists() else "default"
    host = f"[{host}]" if ":" in host else host
    return ClientConfig(
        server=f"https://{host}:{port}",
        tokens=FileToken(service_account_dir / "token"),
        ca_file=ca_file,
        namespace=environ.get("POD_NAMESPACE") or namespace,
    )


def from_kubeconfig(
    path: str | None, *, master: str | None = None, environ: Mapping[str, str] = os.environ
) -> ClientConfig:
    """What ``path`` (None: the default places) says, read by the ``kubernetes`` package."""
    from kubernetes import client, config

    for name in (path or "").split(":"):
        if name and not Path(name).exists():
            raise ConfigError(f"kubeconfig {name}: no such file")
    loaded: Configuration = client.Configuration()
    try:
        config.load_kube_config(  # type: ignore[no-untyped-call]
            config_file=path, client_configuration=loaded
        )
        _, context = config.list_kube_config_contexts(  # type: ignore[no-untyped-call]
            config_file=path
        )
    except Exception as error:  # the package raises whatever its parsers do
        raise ConfigError(f"kubeconfig {path}: cannot be used: {error}") from error
    if getattr(loaded, "tls_server_name", None):
        raise ConfigError(f"kubeconfig {path or 'default'}: tls-server-name is not supported")
    return ClientConfig(
        server=(master or loaded.host).rstrip("/"),
        tokens=_KubeconfigToken(loaded),
        ca_file=_path(loaded.ssl_ca_cert),
        cert_file=_path(loaded.cert_file),
        key_file=_path(loaded.key_file),
        verify=loaded.verify_ssl,
        proxy=loaded.proxy,
        namespace=environ.get("POD_NAMESPACE") or _context_namespace(context),
    )


def _path(name: str | None) -> Path | None:
    return Path(name) if name else None


def _context_namespace(context: object) -> str:
    inner = context.get("context", {}) if isinstance(context, dict) else {}
    return str(inner.get("namespace") or "default")


class _KubeconfigToken:
    """Asks the official client's configuration, which runs exec plugins again when they expire."""

    def __init__(self, loaded: Configuration) -> None:
        self._loaded = loaded
        self._lock = threading.Lock()
        self._token: str | None = None
        self._asked_at: float | None = None

    def token(self) -> str | None:
        now = time.monotonic()
        with self._lock:
            if self._asked_at is None or now - self._asked_at >= _KUBECONFIG_MAX_AGE_S:
                setting = self._loaded.auth_settings().get("BearerToken", {})
                scheme, _, token = (setting.get("value") or "").partition(" ")
                self._token = token if scheme.lower() == "bearer" and token else None
                self._asked_at = now
            return self._token

    def refresh(self) -> None:
        with self._lock:
            self._asked_at = None
