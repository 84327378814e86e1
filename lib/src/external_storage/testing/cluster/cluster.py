"""The cluster itself: a control plane in namespaces, with a node that runs pods."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Final

from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.testing import binaries
from external_storage.testing.access import certificate_user
from external_storage.testing.certificates import CertificateAuthority
from external_storage.testing.cluster import layout, requirements
from external_storage.testing.cluster.guestnode import GuestNode, NodeFiles
from external_storage.testing.cluster.images import write_images
from external_storage.testing.cluster.namespaces import Namespaces
from external_storage.testing.cluster.nodefiles import node_files
from external_storage.testing.cluster.requirements import ClusterError
from external_storage.testing.controlplane import ControlPlane
from external_storage.testing.guest import Guest, Tap
from external_storage.testing.processes import (
    ProcessGroup,
    WorkDirectory,
    describe_exit,
    free_port,
)

_PREFIX: Final = "external-storage-cluster-"
_FORWARD: Final = Path(__file__).parent / "forward.py"
_LOAD_LIMIT_S: Final = 300.0
_STALE: Final = "NotToldSinceTheStart"
_CTR: Final = ("ctr", "--namespace", "k8s.io", "images")


class Cluster(ControlPlane):
    """One cluster, from ``start()`` to ``stop()``; use it as a context manager.

    A ``ControlPlane`` whose API server the machine reaches on a port of 127.0.0.1 as ever, so that
    whatever works with one works with this; and with a node. Ready in 5 to 8 seconds, 600 MiB of
    memory beside the pods'. Pods get images that were loaded before: ``imagePullPolicy`` Never or
    IfNotPresent. ``tools_image`` is there from the start.

    Inside, Kubernetes' parts have their default paths; ``/srv`` and ``/mnt`` are empty and private,
    the rest of the machine's files is seen. There is no DNS; Services have their cluster IPs.
    """

    _programs: ClassVar = (binaries.CONTROL_PLANE, binaries.NODE)
    _server_names: ClassVar = (
        *ControlPlane._server_names,
        layout.NODE_ADDRESS,
        layout.API_SERVICE,
    )

    node_name: ClassVar = layout.NODE
    """The node that is always there."""
    guest_name: ClassVar = layout.GUEST
    """The node that ``add_guest`` adds."""
    tools_image: ClassVar = layout.TOOLS_IMAGE
    """An image with a shell and the usual commands."""

    def __init__(
        self, *, state: Path | None = None, audit: bool = False, start_limit_s: float = 120.0
    ) -> None:
        """Says what to run; starts nothing.

        ``state``: a directory for what a node and etcd keep, which is then there for the next
        cluster; without it, it goes with the cluster. ``audit`` and ``start_limit_s``: see
        ``ControlPlane``.
        """
        super().__init__(scheduler=True, audit=audit, start_limit_s=start_limit_s)
        self._wanted_state = state
        self._state_lock = -1
        self._namespaces: Namespaces | None = None
        self._listener: socket.socket | None = None
        self._authority: CertificateAuthority | None = None
        self._client: Client | None = None
        self._guest_node: GuestNode | None = None
        self._loaded: list[Path] = []

    # Starting and stopping

    def stop(self) -> None:
        """End everything at once and remove it, but for the ``state``; nothing when it is down.

        Pods get no time to end: delete them first where that matters.
        """
        self._clear_away()

    def restart(self) -> None:
        """Take the whole machine's power, as far as Kubernetes can tell, and start it again.

        Every process ends at once, mounts are gone; etcd, images and the kubelet's directory stay.
        Returns when the node is ready again; its pods may not be yet.
        """
        self._forget_client()
        self._remove_guest()
        self._running().kill_all()
        self._in_namespaces().leave()
        self._enter()
        self._start_programs()
        self._wait_for_node(layout.NODE)

    def kill_kubelet(self) -> None:
        """SIGKILL to the kubelet; pods go on."""
        self._running().kill("kubelet")

    def start_kubelet(self) -> None:
        """Start the kubelet again; returns when it has told the API server that it is ready."""
        self._run_kubelet()
        self._wait_for_node(layout.NODE)

    def _clear_away(self) -> None:
        self._forget_client()
        self._remove_guest()
        if self._processes is not None:
            self._processes.kill_all()
        namespaces, self._namespaces = self._namespaces, None
        try:
            if namespaces is not None:
                namespaces.close()
        finally:
            if self._listener is not None:
                self._listener.close()
            if self._state_lock >= 0:
                os.close(self._state_lock)
            self._listener, self._state_lock = None, -1
            super()._clear_away()

    def _make_place(self) -> None:
        self._directory = WorkDirectory(_PREFIX)
        state = self._wanted_state or self.directory / "state"
        state.mkdir(parents=True, exist_ok=True)
        requirements.check(state)
        self._lock(state)
        (state / "etcd").mkdir(mode=0o700, exist_ok=True)
        (self.directory / "etcd").symlink_to(state / "etcd")
        self._etcd_ports = (2379, 2380)
        self._port = free_port()
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=128)
        self._namespaces = Namespaces(self.directory, state)
        write_images(self.directory / "images.tar")
        self._enter()

    def _lock(self, state: Path) -> None:
        self._state_lock = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._state_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(f"another cluster is running with the state in {state}") from None

    def _enter(self) -> None:
        namespaces = self._in_namespaces()
        namespaces.enter(
            {
                # None is reached from here, and one that refuses at once beats one that is silent.
                "/etc/resolv.conf": "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
                "/etc/cni/net.d/10-pods.conflist": layout.pod_network(layout.NODE_PODS),
                "/etc/containerd/config.toml": layout.containerd_configuration(),
            }
        )
        self._processes = ProcessGroup(self.directory, prefix=namespaces.prefix)

    def _start_programs(self) -> None:
        assert self._listener is not None
        target = (layout.NODE_ADDRESS, str(layout.API_PORT))
        listener = self._listener.fileno()
        forward = [sys.executable, "-I", str(_FORWARD), str(listener), *target]
        self._running().start("forward", forward, descriptors=[listener])
        self._running().start("containerd", ["containerd"])
        with ThreadPoolExecutor(1) as pool:
            # Meanwhile the API server starts, which takes longer.
            loaded = pool.submit(self._load_own_images)
            super()._start_programs()
            loaded.result()

    def _start_controllers(self) -> None:
        super()._start_controllers()
        self._run_kubelet()
        self._start_process("kube-proxy", "--config", "kube-proxy.json")

    def _start_once(self) -> None:
        super()._start_once()
        self._wait_for_node(layout.NODE)

    def _run_kubelet(self) -> None:
        self._forget_node(layout.NODE)
        self._start_process(
            "kubelet",
            *("--config", "kubelet.json", "--kubeconfig", "kubelet.kubeconfig"),
            *("--hostname-override", layout.NODE, "--node-ip", layout.NODE_ADDRESS),
        )

    def _apiserver_flags(self) -> dict[str, str]:
        return super()._apiserver_flags() | {
            "bind-address": "0.0.0.0",
            "secure-port": str(layout.API_PORT),
            "advertise-address": layout.NODE_ADDRESS,
            "endpoint-reconciler-type": "lease",
            "service-cluster-ip-range": layout.SERVICES,
            "enable-admission-plugins": "NodeRestriction",
            "kubelet-client-certificate": "kubelet-client.crt",
            "kubelet-client-key": "kubelet-client.key",
            "kubelet-certificate-authority": "ca.crt",
            "kubelet-preferred-address-types": "InternalIP",
            # To the pods themselves for webhooks and aggregated APIs.
            "enable-aggregator-routing": "true",
        }

    @property
    def _inner_url(self) -> str:
        return f"https://{layout.NODE_ADDRESS}:{layout.API_PORT}"

    def _write_files(self) -> CertificateAuthority:
        self._authority = authority = super()._write_files()
        client = authority.issue_client("kube-apiserver-kubelet-client", group="system:masters")
        self._write("kubelet-client.crt", client.certificate)
        self._write("kubelet-client.key", client.key)
        files = node_files(
            authority,
            node=layout.NODE,
            address=layout.NODE_ADDRESS,
            place=self.directory,
            server=self._inner_url,
            cgroup_root=f"/{self._in_namespaces().cgroup}",
        )
        proxy = certificate_user(authority.issue_client("system:kube-proxy"))
        kubeconfig = self._write_kubeconfig("kube-proxy", proxy, server=self._inner_url)
        configuration = layout.proxy_configuration(kubeconfig=kubeconfig)
        files["kube-proxy.json"] = json.dumps(configuration).encode()
        for name, content in files.items():
            self._write(name, content)
        return authority

    # Readiness

    def _forget_node(self, node: str) -> None:
        """Mark what the API server knows of a node's readiness as out of date, if it is there.

        A kubelet that is started again writes nothing for many seconds when it finds the truth.
        """
        path = f"/api/v1/nodes/{node}"
        if self._admin_client().has(path):
            stale = {"type": "Ready", "status": "True", "reason": _STALE, "message": ""}
            self.request("PATCH", f"{path}/status", {"status": {"conditions": [stale]}})

    def _wait_for_node(self, node: str) -> None:
        """Wait until its kubelet says that it is ready, and it takes pods."""

        def is_ready() -> bool:
            if not self._admin_client().has(f"/api/v1/nodes/{node}"):
                return False
            found = self.request("GET", f"/api/v1/nodes/{node}")
            conditions = {c["type"]: c for c in found["status"].get("conditions", ())}
            ready = conditions.get("Ready", {"status": "Unknown"})
            said = ready["status"] == "True" and ready["reason"] != _STALE
            return said and not found["spec"].get("taints")

        self._wait_for(f"the node {node} to be ready", is_ready)

    def _containerd_answers(self) -> bool:
        return self._try_run("ctr", "version").returncode == 0

    # Using it

    @property
    def client(self) -> Client:
        """A client with all rights; closed by ``stop``."""
        if self._client is None:
            self._client = Client(auth.load(kubeconfig=str(self.kubeconfig)))
        return self._client

    @property
    def lacks_capabilities(self) -> frozenset[str]:
        """Capabilities that no container can have here: this machine has none to give."""
        known = subprocess.run(
            ["setpriv", "--list-caps"], capture_output=True, text=True, check=True
        ).stdout.split()
        dump = subprocess.run(["setpriv", "--dump"], capture_output=True, text=True, check=True)
        bounding = next(line for line in dump.stdout.splitlines() if "bounding set" in line)
        has = {name.strip() for name in bounding.partition(":")[2].split(",")}
        return frozenset(name.upper() for name in known if name not in has)

    @property
    def first_process(self) -> int:
        """Process id of the first process of the node, for ``nsenter --target``."""
        return self._in_namespaces().first_process

    def load_image(self, archive: Path) -> list[str]:
        """Load the images of an OCI or docker archive on every node; the names that are new.

        The same file is loaded once.
        """
        path = archive.absolute()
        if path in self._loaded:
            return []
        before = set(self.images())
        self.run(*_CTR, "import", str(path), limit_s=_LOAD_LIMIT_S)
        self._loaded.append(path)
        if self._guest_node is not None:
            self._guest_node.load_image(path)
        return sorted(set(self.images()) - before)

    def add_guest(self, *, memory_mib: int = 1024) -> Guest:
        """Start a QEMU guest on the nodes' network and have it join, as the node ``guest_name``.

        It has the images that were loaded before; what is loaded later takes long there. It is gone
        after ``stop()``, and after ``restart()``. Returns when it takes pods.
        """
        if self._guest_node is not None:
            raise ClusterError("the cluster has a guest already")
        assert self._authority is not None
        namespaces = self._in_namespaces()
        self.run("ip", "tuntap", "add", "guest", "mode", "tap")
        self.run("ip", "link", "set", "guest", "master", layout.BRIDGE, "up")
        tap = Tap(interface="guest", address=f"{layout.GUEST_ADDRESS}/24", host=layout.NODE_ADDRESS)
        prefix = namespaces.network_prefix
        guest = Guest(name=layout.GUEST, memory_mib=memory_mib, prefix=prefix, tap=tap)
        files = NodeFiles(
            server=self._inner_url,
            authority=self._authority,
            kubelet=self.program("kubelet"),
            images=[self.directory / "images.tar", *self._loaded],
        )
        directory = self.directory / "guest"
        directory.mkdir()
        try:
            guest.start()
            self._guest_node = GuestNode(guest, files, directory=directory)
            self._guest_node.join()
            self._wait_for_node(layout.GUEST)
        except BaseException:
            guest.stop()
            self._guest_node = None
            raise
        return guest

    def images(self) -> list[str]:
        """The names of the images that the node has."""
        names = self.run(*_CTR, "list", "--quiet").split()
        return [name for name in names if not name.startswith("sha256:")]

    def run(self, *argv: str, input: str | None = None, limit_s: float = 60.0) -> str:
        """Run a program on the node, as root, and return what it prints.

        Raises ``ClusterError`` with its standard error when it fails, or has not ended after
        ``limit_s`` seconds.
        """
        try:
            done = self._try_run(*argv, input=input, limit_s=limit_s)
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{' '.join(argv)}: no end in {limit_s:.0f} s") from None
        if done.returncode != 0:
            raise ClusterError(f"{' '.join(argv)}: {describe_exit(done.returncode)}: {done.stderr}")
        return done.stdout

    def command(self, *argv: str) -> list[str]:
        """What runs ``argv`` on the node when run here, for ``subprocess``: it dies with that."""
        return [*self._in_namespaces().prefix, *argv]

    def _try_run(
        self, *argv: str, input: str | None = None, limit_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*argv),
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )

    def _load_own_images(self) -> None:
        self._wait_for("containerd to answer", self._containerd_answers)
        self.run(*_CTR, "import", str(self.directory / "images.tar"), limit_s=_LOAD_LIMIT_S)

    def _in_namespaces(self) -> Namespaces:
        if self._namespaces is None:
            raise ClusterError("the cluster is not running")
        return self._namespaces

    def _forget_client(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _remove_guest(self) -> None:
        node, self._guest_node = self._guest_node, None
        if node is not None:
            node.guest.stop()
