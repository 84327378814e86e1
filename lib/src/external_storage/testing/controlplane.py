"""A real Kubernetes control plane on loopback: etcd, kube-apiserver, kube-controller-manager.

It is what the tests of this project and of any provisioner stand on instead of a fake server: the
PersistentVolume binder, the protection finalizers, garbage collection, RBAC and the audit log are
Kubernetes' own. There is no node and no kubelet: pods are stored, never run; ``cluster.Cluster`` is
one where they run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Self

from external_storage.testing import binaries
from external_storage.testing.access import (
    AdminClient,
    ControlPlaneError,
    certificate_user,
    render_kubeconfig,
    run_kubectl,
)
from external_storage.testing.certificates import CertificateAuthority, SigningKey
from external_storage.testing.processes import ProcessGroup, WorkDirectory, describe_exit, free_port

_PREFIX: Final = "external-storage-controlplane-"
_STOP_LIMIT_S: Final = 10.0
_POLL_S: Final = 0.05
_START_ATTEMPTS: Final = 5

# Every request once, when it is answered; a watch when it starts and when it ends.
_AUDIT_POLICY: Final = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}


class _PortTaken(ControlPlaneError):
    """A process found the port chosen for it in use."""


class ControlPlane:
    """One control plane, from ``start()`` to ``stop()``; use it as a context manager.

    Ready in about three seconds, 440 MiB of memory. All of it listens on 127.0.0.1 only. It is
    stopped and its directory removed on leaving the context; when this process is killed instead,
    the kernel kills the children with it and the next start removes the directory.

    One thread at a time may start and stop it; any thread may use it in between.
    """

    _programs: ClassVar[Sequence[binaries.ProgramSet]] = (binaries.CONTROL_PLANE,)
    _server_names: ClassVar[tuple[str, ...]] = (
        *("127.0.0.1", "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"),
        "kubernetes.default.svc.cluster.local",
        "10.0.0.1",  # the first service address: KUBERNETES_SERVICE_HOST of a pod
        "10.0.2.2",  # what a QEMU guest with user networking calls the host's 127.0.0.1
    )

    def __init__(
        self, *, scheduler: bool = False, audit: bool = False, start_limit_s: float = 120.0
    ) -> None:
        """Says what to run; starts nothing.

        ``scheduler``: run kube-scheduler too (claims of binding mode WaitForFirstConsumer need it).
        ``audit``: keep an audit log, for ``audit_events()``.
        ``start_limit_s``: seconds after which a start, or a start of the API server, has failed.
        """
        self._with_scheduler = scheduler
        self._with_audit = audit
        self._start_limit_s = start_limit_s
        self._binaries: binaries.Binaries | None = None
        self._directory: WorkDirectory | None = None
        self._processes: ProcessGroup | None = None
        self._etcd_ports = (0, 0)
        self._port = 0
        self._admin: AdminClient | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # Starting and stopping

    def start(self) -> None:
        """Start it and return when it is ready for claims.

        The binaries are built first where they are missing, which takes minutes: see ``binaries``.
        Raises ``ControlPlaneError`` with the last log lines of the process that failed,
        ``binaries.BinariesError`` when there are no binaries to run.
        """
        if self._directory is not None:
            raise ControlPlaneError("the control plane is already running")
        self._binaries = binaries.ensure(self._programs)
        for attempt in range(1, _START_ATTEMPTS + 1):
            try:
                self._start_once()
                return
            except BaseException as error:
                # Nothing of it is worth an orderly end, which a half-started API server is slow at.
                self._clear_away()
                if not isinstance(error, _PortTaken) or attempt == _START_ATTEMPTS:
                    raise

    def stop(self) -> None:
        """Stop every process and remove the directory; nothing when it does not run."""
        try:
            if self._processes is not None:
                clients = ("kube-scheduler", "kube-controller-manager")
                self._processes.stop(*clients, "kube-apiserver", limit_s=_STOP_LIMIT_S)
                # After the API server, which would wait for it.
                self._processes.stop("etcd", limit_s=_STOP_LIMIT_S)
        finally:
            self._clear_away()

    def stop_apiserver(self) -> None:
        """Stop the API server alone; etcd keeps its data, clients find their connections closed."""
        self._running().stop("kube-apiserver", limit_s=_STOP_LIMIT_S)

    def start_apiserver(self) -> None:
        """Start the API server again, on the same port; returns when it is ready."""
        flags = [f"--{name}={value}" for name, value in self._apiserver_flags().items()]
        self._start_process("kube-apiserver", *flags)
        self._wait_for("kube-apiserver to be ready", self._admin_client().is_ready)

    def start_scheduler(self) -> None:
        """Start kube-scheduler, for a part of the tests; nothing when it runs already."""
        if "kube-scheduler" not in self.pids:
            kubeconfig = ("--kubeconfig", "kube-scheduler.kubeconfig")
            flags = ("--leader-elect=false", "--secure-port=0")
            self._start_process("kube-scheduler", *kubeconfig, *flags)

    def stop_scheduler(self) -> None:
        """Stop kube-scheduler; nothing when it does not run."""
        self._running().stop("kube-scheduler", limit_s=_STOP_LIMIT_S)

    def _clear_away(self) -> None:
        if self._processes is not None:
            self._processes.kill_all()
        if self._directory is not None:
            self._directory.remove()
        self._processes = self._directory = self._admin = None

    def _start_once(self) -> None:
        self._make_place()
        self._write_files()
        self._start_programs()

    def _make_place(self) -> None:
        """A directory, what runs programs in it, and the ports."""
        self._directory = WorkDirectory(_PREFIX)
        self._processes = ProcessGroup(self._directory.path)
        self._etcd_ports = (free_port(), free_port())
        self._port = free_port()

    def _start_programs(self) -> None:
        # No client certificates for etcd: it listens on loopback and holds nothing but test data.
        client, peer = (f"http://127.0.0.1:{port}" for port in self._etcd_ports)
        self._start_process(
            "etcd",
            *("--name", "default", "--data-dir", "etcd", "--unsafe-no-fsync"),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"default={peer}", "--log-level", "warn"),
        )
        self.start_apiserver()
        self._start_controllers()
        self._wait_for("the default service account and the root CA", self._has_defaults)

    def _start_controllers(self) -> None:
        kubeconfig = ("--kubeconfig", "kube-controller-manager.kubeconfig")
        self._start_process(
            "kube-controller-manager",
            *kubeconfig,
            *("--root-ca-file", "ca.crt"),
            *("--service-account-private-key-file", "service-account.key"),
            *("--use-service-account-credentials", "--leader-elect=false", "--secure-port=0"),
            # With its default of 20 a second it needs 5 s for its first start on an empty etcd.
            *("--kube-api-qps", "400", "--kube-api-burst", "800"),
        )
        if self._with_scheduler:
            self.start_scheduler()

    def _apiserver_flags(self) -> dict[str, str]:
        flags = {
            "etcd-servers": f"http://127.0.0.1:{self._etcd_ports[0]}",
            "bind-address": "127.0.0.1",
            "secure-port": str(self._port),
            # The endpoints of the service "kubernetes" may not be a loopback address; the
            # reconciler would log that refusal for ever.
            "advertise-address": "127.0.0.1",
            "endpoint-reconciler-type": "none",
            "tls-cert-file": "apiserver.crt",
            "tls-private-key-file": "apiserver.key",
            "client-ca-file": "ca.crt",
            "authorization-mode": "RBAC,Node",
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": "service-account.pub",
            "service-account-signing-key-file": "service-account.key",
            "service-cluster-ip-range": "10.0.0.0/24",
            "allow-privileged": "true",
            "profiling": "false",
            # Else it waits, on SIGTERM, up to a minute for clients to end their watches.
            "shutdown-watch-termination-grace-period": "1s",
        }
        if self._with_audit:
            flags |= {"audit-policy-file": "audit-policy.json", "audit-log-path": "audit.log"}
            flags["audit-log-maxsize"] = "100000"  # MiB: rotated lines would be lost to us
        return flags

    def _start_process(self, name: str, *flags: str) -> None:
        self._running().start(name, [str(self.program(name)), *flags])

    def _write_files(self) -> CertificateAuthority:
        """Certificates, keys and kubeconfigs; the authority, for more of them."""
        authority = CertificateAuthority()
        server = authority.issue_server(self._server_names)
        signing = SigningKey.create()
        admin = authority.issue_client("admin", group="system:masters")
        self._write("ca.crt", authority.certificate)
        self._write("apiserver.crt", server.certificate)
        self._write("apiserver.key", server.key)
        self._write("service-account.key", signing.private)
        self._write("service-account.pub", signing.public)
        self._write("audit-policy.json", json.dumps(_AUDIT_POLICY).encode())
        certificate_file = self._write("admin.pem", admin.certificate + admin.key)
        self._write_kubeconfig("admin", certificate_user(admin))
        for name in ("kube-controller-manager", "kube-scheduler"):
            user = certificate_user(authority.issue_client(f"system:{name}"))
            self._write_kubeconfig(name, user, server=self._inner_url)
        self._admin = AdminClient(
            url=self.url, ca_file=self.ca_file, certificate_file=certificate_file
        )
        return authority

    def _write(self, name: str, content: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(content)
        path.chmod(0o600)
        return path

    def _write_kubeconfig(
        self, name: str, user: Mapping[str, str], *, server: str | None = None
    ) -> Path:
        ca = self.ca_file.read_bytes()
        content = render_kubeconfig(server=server or self.url, ca=ca, name=name, user=user)
        return self._write(f"{name}.kubeconfig", content)

    # Readiness

    def _wait_for(self, what: str, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._start_limit_s
        while not is_so():
            if (ended := self.ended()) is not None:
                kind = _PortTaken if "address already in use" in ended else ControlPlaneError
                raise kind(f"while waiting for {what}: {ended}")
            if time.monotonic() > deadline:
                raise ControlPlaneError(
                    f"waited {self._start_limit_s:.0f} s for {what}; the logs end:\n"
                    + "\n".join(f"--- {p.name}\n{p.tail()}" for p in self._running().all())
                )
            time.sleep(_POLL_S)

    def _has_defaults(self) -> bool:
        namespace, admin = "/api/v1/namespaces/default", self._admin_client()
        return admin.has(f"{namespace}/serviceaccounts/default") and admin.has(
            f"{namespace}/configmaps/kube-root-ca.crt"
        )

    # Using it

    @property
    def directory(self) -> Path:
        """The working directory: data, keys, logs (``<process>.log``). Gone after ``stop()``."""
        if self._directory is None:
            raise ControlPlaneError("the control plane is not running")
        return self._directory.path

    @property
    def url(self) -> str:
        """The address of the API server, ``https://127.0.0.1:<port>``; the same after a restart."""
        return f"https://127.0.0.1:{self._port}"

    @property
    def _inner_url(self) -> str:
        """The address of the API server for our own programs."""
        return self.url

    @property
    def port(self) -> int:
        """The TCP port of the API server."""
        return self._port

    @property
    def ca_file(self) -> Path:
        """The certificate of the authority that signed the API server's, PEM."""
        return self.directory / "ca.crt"

    @property
    def kubeconfig(self) -> Path:
        """A kubeconfig of an admin (group ``system:masters``), nothing outside the file needed."""
        return self.directory / "admin.kubeconfig"

    @property
    def pids(self) -> dict[str, int]:
        """The pid of every running process, by its name."""
        return {p.name: p.pid for p in self._running().all() if p.exit_code is None}

    def program(self, name: str) -> Path:
        """The path of one of ``binaries.NAMES``, the one that runs."""
        if self._binaries is None:
            raise ControlPlaneError("the control plane is not running")
        return self._binaries[name]

    def ended(self) -> str | None:
        """How a process has ended by itself, with the end of its log; None: all run."""
        process = self._running().ended()
        if process is None:
            return None
        how = describe_exit(process.exit_code or 0)
        return f"{process.name} {how}; its log ends:\n{process.tail()}"

    def request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """One API request as admin; see ``AdminClient.request``."""
        return self._admin_client().request(method, path, body)

    def kubectl(
        self,
        *args: str,
        input: str | None = None,
        kubeconfig: Path | None = None,
        limit_s: float = 60.0,
    ) -> str:
        """Run kubectl, as admin unless ``kubeconfig`` is another's, and return what it prints.

        ``input`` is its standard input. Raises ``ControlPlaneError`` with its standard error when
        it fails, or when it has not ended after ``limit_s`` seconds.
        """
        return run_kubectl(
            [str(self.program("kubectl")), "--kubeconfig", str(kubeconfig or self.kubeconfig)],
            args,
            cache=self.directory / "kubectl-cache",
            input=input,
            limit_s=limit_s,
        )

    def service_account_token(self, namespace: str, name: str, *, duration_s: int = 3600) -> str:
        """A token of a service account, which must exist; valid for ``duration_s`` (least: 600).

        From the TokenRequest API, as a pod gets its own; nothing is stored in the cluster.
        """
        spec = {"expirationSeconds": duration_s}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        return str(self.request("POST", path, body)["status"]["token"])

    def service_account_kubeconfig(
        self, namespace: str, name: str, *, duration_s: int = 3600
    ) -> Path:
        """A kubeconfig with a fresh token of a service account, in ``directory``."""
        token = self.service_account_token(namespace, name, duration_s=duration_s)
        return self._write_kubeconfig(f"{namespace}.{name}", {"token": token})

    def audit_events(self) -> list[dict[str, Any]]:
        """The audit log so far, oldest first: one event a request, level Metadata.

        A watch has one event when it starts and one when it ends.
        """
        if not self._with_audit:
            raise ControlPlaneError("no audit log was asked for: ControlPlane(audit=True)")
        lines = (self.directory / "audit.log").read_bytes().splitlines(keepends=True)
        # The last line may still be in the writing.
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def _running(self) -> ProcessGroup:
        if self._processes is None:
            raise ControlPlaneError("the control plane is not running")
        return self._processes

    def _admin_client(self) -> AdminClient:
        if self._admin is None:
            raise ControlPlaneError("the control plane is not running")
        return self._admin
