"""Reaching a test control plane: kubeconfig files, and a client for the few calls of its own.

The client is urllib and not ``external_storage.kube``, whose own tests must not rest on it.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from external_storage.testing.certificates import KeyPair

_TIMEOUT_S: Final = 30.0
# Asked again and again while something starts, perhaps of a stranger that holds its port.
_PROBE_TIMEOUT_S: Final = 2.0


class ControlPlaneError(Exception):
    """The control plane could not be started, or refused a request of the test itself."""


def certificate_user(pair: KeyPair) -> dict[str, str]:
    """The ``user`` part of a kubeconfig for a client certificate."""
    return {
        "client-certificate-data": base64.b64encode(pair.certificate).decode(),
        "client-key-data": base64.b64encode(pair.key).decode(),
    }


def render_kubeconfig(*, server: str, ca: bytes, name: str, user: Mapping[str, str]) -> bytes:
    """A kubeconfig with everything in it, for one cluster and one user called ``name``.

    ``ca``: PEM of the authority. ``user``: as in the file, ``{"token": ...}`` for example.
    """
    cluster = {"server": server, "certificate-authority-data": base64.b64encode(ca).decode()}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "testing", "cluster": cluster}],
        "users": [{"name": name, "user": dict(user)}],
        "contexts": [{"name": name, "context": {"cluster": "testing", "user": name}}],
        "current-context": name,
    }
    # JSON, which is YAML too: one dependency less.
    return json.dumps(config, indent=2).encode()


def run_kubectl(
    command: Sequence[str],
    args: Sequence[str],
    *,
    cache: Path,
    input: str | None = None,
    limit_s: float = 60.0,
) -> str:
    """Run kubectl and return what it prints; ``command`` is the program with its first flags.

    ``cache``: a directory for what it finds out about the server. ``input`` is its standard input.
    Raises ``ControlPlaneError`` with its standard error when it fails, or when it has not ended
    after ``limit_s`` seconds.
    """
    # By default both are in the home directory, which is not ours to fill or to read.
    environment = {**os.environ, "KUBECACHEDIR": str(cache), "KUBERC": "off"}
    try:
        done = subprocess.run(
            [*command, *args],
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            env=environment,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ControlPlaneError(f"kubectl {' '.join(args)}: no end in {limit_s} s") from None
    if done.returncode != 0:
        raise ControlPlaneError(f"kubectl {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout


class AdminClient:
    """Sends single requests to the API server under a client certificate."""

    def __init__(self, *, url: str, ca_file: Path, certificate_file: Path) -> None:
        """``certificate_file``: PEM, the certificate and its key."""
        context = ssl.create_default_context(cafile=str(ca_file))
        context.load_cert_chain(certificate_file)
        self._url = url
        # An explicit empty ProxyHandler: the environment's proxy is not for loopback.
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )

    def request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The answer, an object of the API.

        ``path`` starts with a slash and may have a query. Raises ``ControlPlaneError`` for a status
        of 400 and above, with the server's words; ``OSError`` when there is no answer.
        """
        answer: dict[str, Any] = json.loads(self._send(method, path, body))
        return answer

    def is_ready(self) -> bool:
        """Whether the server answers, and says that it is ready for requests."""
        return self.has("/readyz")

    def has(self, path: str) -> bool:
        """Whether ``path`` is there; not so when no answer comes within two seconds."""
        try:
            self._send("GET", path, timeout_s=_PROBE_TIMEOUT_S)
        except (ControlPlaneError, OSError):
            return False
        return True

    def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        timeout_s: float = _TIMEOUT_S,
    ) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        request = urllib.request.Request(
            self._url + path, data=data, method=method, headers={"Content-Type": kind}
        )
        try:
            with self._opener.open(request, timeout=timeout_s) as response:
                content: bytes = response.read()
        except urllib.error.HTTPError as error:
            words = error.read().decode(errors="replace")
            raise ControlPlaneError(f"{method} {path}: {error.code} {words[:512]}") from None
        return content
