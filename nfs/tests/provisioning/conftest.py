"""nfs-provisioner as a process of its own, under the ServiceAccount of its manifests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from external_storage import PersistentVolume, PersistentVolumeClaim, StorageClass
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.errors import KubeError
from external_storage.kube.names import ANN_PROVISIONED_BY
from external_storage.kube.types import Event
from external_storage.testing import ControlPlane
from nfs_provisioner.exportmgr import ExportManager

DEPLOY = Path(__file__).parents[2] / "deploy"
ACCOUNT = ("nfs-provisioner", "nfs-provisioner")
LIMIT_S = 120.0


def wait_until(met: Callable[[], Any], what: str) -> Any:
    """Poll until ``met`` returns something true, and return that."""
    deadline = time.monotonic() + LIMIT_S
    while not (result := met()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {LIMIT_S:.0f} s")
        time.sleep(0.05)
    return result


def children_of(pid: int) -> list[int]:
    """All processes below ``pid``."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(word) for word in (task / "children").read_text().split()]
    return found + [below for child in found for below in children_of(child)]


@dataclass
class Deployment:
    """One provisioner name with its class, its export root, and the process that may run."""

    plane: ControlPlane
    api: Client
    namespace: str
    root: Path
    kubeconfig: Path
    nfs_port: int
    http_port: int
    log: Path
    command: tuple[str, ...] = (sys.executable, "-m", "nfs_provisioner")
    process: subprocess.Popen[bytes] | None = None
    classes: list[StorageClass] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"example.com/{self.namespace}"

    # -- the process

    def start(self, *, ready: bool = True) -> None:
        flags = [
            f"--provisioner-name={self.name}",
            f"--kubeconfig={self.kubeconfig}",
            f"--export-root={self.root / 'export'}",
            f"--run-dir={self.root / 'run'}",
            "--server-hostname=127.0.0.1",
            "--bind-address=127.0.0.1",
            f"--nfs-port={self.nfs_port}",
            f"--http-endpoint=127.0.0.1:{self.http_port}",
            "--grace-period=2",
            "--lease-lifetime=2",
            "--retry-interval-start=0.2",
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*self.command, *flags], stdout=log, stderr=log)
        if ready:
            wait_until(self.is_ready, "nfs-provisioner is ready")

    def kill(self, *, with_children: bool) -> None:
        """SIGKILL, and wait until it and what it had started are gone."""
        assert self.process is not None
        below = children_of(self.process.pid)
        assert below, "no children: it was not running as it should"
        for pid in [self.process.pid, *(below if with_children else ())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not any(map(_is_running, below)), "its children are gone")

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(LIMIT_S)

    def child(self, program: str) -> int:
        """The pid of its child that runs ``program``."""
        assert self.process is not None
        for pid in children_of(self.process.pid):
            with contextlib.suppress(OSError):
                if program in Path(f"/proc/{pid}/comm").read_text():
                    return pid
        return 0

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of one of its HTTP endpoints; 0 when it does not answer."""
        try:
            url = f"http://127.0.0.1:{self.http_port}{path}"
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def is_ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            pytest.fail(f"it ended with {self.process.returncode}:\n{self.tail()}")
        return self.get("/readyz")[0] == 200

    def metric(self, pattern: str) -> float:
        """The sum of the samples whose name and labels match."""
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(pattern, line))

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-60000:]

    # -- the cluster

    def storage_class(self, suffix: str = "", **parameters: str) -> str:
        body = {
            "metadata": {"name": f"{self.namespace}{suffix}"},
            "provisioner": self.name,
            "parameters": parameters,
        }
        self.classes.append(self.api.create(StorageClass, body))
        return self.classes[-1].name

    def claim(self, name: str, storage_class: str, **spec: Any) -> None:
        body = {
            "metadata": {"name": name},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "storageClassName": storage_class,
                "resources": {"requests": {"storage": "1Mi"}},
                **spec,
            },
        }
        self.api.create(PersistentVolumeClaim, body, namespace=self.namespace)

    def claims(self) -> list[PersistentVolumeClaim]:
        return self.api.list_all(PersistentVolumeClaim, namespace=self.namespace)

    def claims_at_once(self, names: list[str], storage_class: str) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: self.claim(name, storage_class), names))

    def delete_claims(self) -> None:
        def delete(claim: PersistentVolumeClaim) -> None:
            self.api.delete(
                PersistentVolumeClaim, claim.name, uid=claim.uid, namespace=self.namespace
            )

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(delete, self.claims()))

    def volumes(self) -> list[PersistentVolume]:
        return [
            volume
            for volume in self.api.list_all(PersistentVolume)
            if volume.metadata.annotations.get(ANN_PROVISIONED_BY) == self.name
        ]

    def wait_bound(self, count: int) -> list[PersistentVolume]:
        """Wait until that many claims are Bound, no more and no less; their volumes."""

        def phases() -> list[str]:
            return [claim.status.phase for claim in self.claims()]

        wait_until(lambda: phases() == ["Bound"] * count, f"{count} claims are Bound")
        return self.volumes()

    def wait_gone(self) -> None:
        wait_until(lambda: not self.volumes(), "every volume is gone")

    def events(self, about: str, reason: str) -> list[Event]:
        return [
            event
            for event in self.api.list_all(Event)
            if event.involved_object.name == about
            and event.reason == reason
            and event.source.component == self.name
        ]

    # -- the backend

    @property
    def export_root(self) -> Path:
        return self.root / "export"

    def directories(self) -> list[str]:
        return sorted(p.name for p in self.export_root.iterdir() if p.name != ".state")

    def records(self) -> list[str]:
        return sorted(p.stem for p in (self.export_root / ".state" / "volumes").glob("*.json"))

    def export_files(self) -> list[str]:
        return sorted(p.stem for p in (self.export_root / ".state" / "exports.d").glob("*.conf"))

    def live_exports(self) -> dict[int, str]:
        """Id → directory, as Ganesha itself says over D-Bus."""
        manager = ExportManager(f"unix:path={self.root / 'run' / 'bus'}")
        try:
            return manager.show()
        finally:
            manager.close()

    def everything(self) -> dict[str, list[str]]:
        """The volume names that each place knows, which should be the same everywhere."""
        return {
            "volumes": sorted(volume.name for volume in self.volumes()),
            "directories": self.directories(),
            "records": self.records(),
            "export files": self.export_files(),
            "live exports": sorted(Path(path).name for path in self.live_exports().values()),
        }

    def url(self, path: str) -> str:
        return f"nfs://127.0.0.1{path}?nfsport={self.nfs_port}&version=4"

    def clean_up(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for volume in self.volumes():
            with contextlib.suppress(KubeError):
                self.api.patch(PersistentVolume, volume.name, {"metadata": {"finalizers": None}})
                self.api.delete(PersistentVolume, volume.name, uid=volume.uid)
        for made in self.classes:
            with contextlib.suppress(KubeError):
                self.api.delete(StorageClass, made.name, uid=made.uid)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture(scope="session")
def account(control_plane: ControlPlane) -> Path:
    """A kubeconfig for the ServiceAccount of ``deploy/rbac.yaml``, with its rights and no more."""
    for name in ("namespace.yaml", "rbac.yaml"):
        control_plane.kubectl("apply", "-f", str(DEPLOY / name))
    return control_plane.service_account_kubeconfig(*ACCOUNT)


@pytest.fixture
def deployment(
    needs_ganesha: None,
    control_plane: ControlPlane,
    account: Path,
    namespace: str,
    root: Path,
    tmp_path: Path,
) -> Iterator[Deployment]:
    (root / "export").mkdir()
    api = Client(auth.load(kubeconfig=str(control_plane.kubeconfig)))
    log = tmp_path / "nfs-provisioner.log"
    log.touch()
    made = Deployment(
        plane=control_plane,
        api=api,
        namespace=namespace,
        root=root,
        kubeconfig=account,
        nfs_port=_free_port(),
        http_port=_free_port(),
        log=log,
    )
    try:
        yield made
    finally:
        made.clean_up()
        api.close()
        sys.stderr.write(made.tail())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
