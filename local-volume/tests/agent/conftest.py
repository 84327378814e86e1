"""The agent as a process, on a node of the test's own: it looks at the test's disks alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from external_storage import PersistentVolume, PersistentVolumeClaim, StorageClass
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.errors import KubeError, NotFound
from external_storage.kube.types import Event
from external_storage.testing import ControlPlane, FaultProxy
from external_storage.testing.processes import die_with_parent, free_port, log_tail
from external_storage.testing.waiting import wait_until
from local_volume_provisioner.names import LABEL_NODE
from local_volume_provisioner.node import Node as NodeObject

T = TypeVar("T")

MIB = 1 << 20
SECRET = b"somebody's data " * 4096
STOP_S = 60.0


def sh(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"


class Agent:
    """The program on a node of the test's own."""

    def __init__(self, node: str, directory: Path, proxy: FaultProxy) -> None:
        self.node = node
        self.state = directory / "state"
        self.config = directory / "config"
        self.config.mkdir()
        self.log = directory / "agent.log"
        self.kubeconfig = proxy.kubeconfig()
        self.flags: list[str] = ["--brake-volumes=0"]
        self.wrapper: Sequence[str] = ()
        self._directory = directory
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *flags: str) -> None:
        self._port = free_port()
        command = [
            *self.wrapper,
            *(sys.executable, "-m", "local_volume_provisioner", f"--node-name={self.node}"),
            *(f"--config-dir={self.config}", f"--state-dir={self.state}"),
            *(f"--run-dir={self._directory}/run", f"--http-endpoint=127.0.0.1:{self._port}"),
            *(f"--kubeconfig={self.kubeconfig}", *self.flags, *flags),
        ]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                die_with_parent(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(lambda: self.get("/readyz")[0] == 200, "the agent is ready", explain=self.tail)

    def refused(self) -> str:
        """Run it with a configuration that it is expected to refuse; what it says."""
        command = [sys.executable, "-m", "local_volume_provisioner", f"--node-name={self.node}"]
        command += [f"--config-dir={self.config}", f"--kubeconfig={self.kubeconfig}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=STOP_S)
        assert done.returncode == 1
        return done.stderr

    def stop(self) -> int:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(STOP_S)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def get(self, path: str) -> tuple[int, str]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.endpoint}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def entries(self) -> dict[str, dict[str, Any]]:
        body = json.loads(self.get("/volumes")[1])
        return {Path(entry["path"]).name: entry for entry in body["entries"]}

    def metric(self, start: str) -> float:
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start))

    def tail(self) -> str:
        return log_tail(self.log, 60)


@dataclass
class Node:
    """A node object, its directory of disks, its agent, and what users do."""

    api: Client
    name: str
    namespace: str
    disks: Any
    agent: Agent
    proxy: FaultProxy
    entries: Path
    _classes: list[StorageClass] = field(default_factory=list)

    def register(self) -> None:
        """Make the node's object."""
        labels = {"kubernetes.io/hostname": self.name, "zone": "a"}
        self.api.create(NodeObject, {"metadata": {"name": self.name, "labels": labels}})

    # -- what an admin does

    def class_(self, suffix: str = "", **fields: Any) -> str:
        name = f"{self.name}{suffix}"
        body = {"metadata": {"name": name}, "provisioner": "kubernetes.io/no-provisioner", **fields}
        self._classes.append(self.api.create(StorageClass, body))
        return name

    def configure(self, *, top: dict[str, Any] | None = None, **classes: dict[str, Any]) -> None:
        """Keywords: suffixes of classes (``_`` for none), and what differs from the default."""
        values = {
            self.name + (f"-{suffix}" if suffix != "_" else ""): {
                "hostDir": str(self.entries),
                "mountDir": str(self.entries),
                **fields,
            }
            for suffix, fields in classes.items()
        }
        texts = {"storageClassMap": json.dumps(values)}
        texts |= {key: json.dumps(value) for key, value in (top or {}).items()}
        for old in self.agent.config.iterdir():
            if old.name not in texts:
                old.unlink()
        for key, text in texts.items():
            staged = self.agent.config.parent / "staged"
            staged.write_text(text)
            staged.rename(self.agent.config / key)

    def block(self, **fields: Any) -> dict[str, Any]:
        """A class of raw devices without hardware ids, as loop devices are."""
        return {"volumeMode": "Block", "identity": "placement", **fields}

    def link(self, name: str, target: Any) -> Path:
        """``target``: a path, or what ``disks.disk`` gives."""
        path = self.entries / name
        path.unlink(missing_ok=True)
        path.symlink_to(getattr(target, "path", target))
        return path

    def tmpfs(self, name: str, size: str = "16m") -> Path:
        mounted: Path = self.disks.mount(
            self.entries / name, "-t", "tmpfs", "-o", f"size={size}", "none"
        )
        return mounted

    def file_system(self, name: str, kind: str = "ext4", size: int = 32 * MIB) -> Path:
        disk = self.disks.disk(f"fs-{name}", size)
        sh(f"mkfs.{kind}", "-q", disk.path)
        mounted: Path = self.disks.mount(self.entries / name, disk.path)
        return mounted

    def cli(self, *argv: str, check: bool = True) -> str:
        environment = {**os.environ, "STATE_DIR": str(self.agent.state)}
        command = [sys.executable, "-m", "local_volume_provisioner.cli", *argv]
        command += [] if argv[0] == "check-config" else [f"--endpoint={self.agent.endpoint}"]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, timeout=STOP_S
        )
        assert not check or done.returncode == 0, done.stderr + done.stdout
        return done.stdout + done.stderr

    # -- what users do

    def volumes(self) -> dict[str, PersistentVolume]:
        found = self.api.list_all(PersistentVolume, label_selector=f"{LABEL_NODE}={self.name}")
        return {Path(v.spec.local.path).name: v for v in found if v.spec.local is not None}

    def volume(self, entry: str, *, other_than: str = "") -> PersistentVolume:
        """Wait until there is one, Available."""

        def found() -> PersistentVolume | None:
            volume = self.volumes().get(entry)
            fit = volume is not None and volume.status.phase == "Available"
            return volume if fit and volume is not None and volume.uid != other_than else None

        return self.wait(found, f"a volume for {entry}")

    def bind(self, entry: str) -> PersistentVolume:
        """A claim for exactly this volume, Bound."""
        self.volume(entry)
        self.claim(entry)
        return self.wait_phase(entry, "Bound")

    def claim(self, entry: str) -> None:
        """A claim for exactly this volume; KeyError if it has gone."""
        volume = self.volumes()[entry]
        body = {
            "metadata": {"name": f"claim-{uuid.uuid4().hex[:8]}"},
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "storageClassName": volume.spec.storage_class_name,
                "volumeMode": volume.spec.volume_mode,
                "volumeName": volume.name,
                "resources": {"requests": {"storage": "1Mi"}},
            },
        }
        self.api.create(PersistentVolumeClaim, body, namespace=self.namespace)

    def wait_phase(self, entry: str, phase: str) -> PersistentVolume:
        def found() -> PersistentVolume | None:
            volume = self.volumes().get(entry)
            return volume if volume is not None and volume.status.phase == phase else None

        return self.wait(found, f"{entry} is {phase}")

    def release(self, entry: str) -> PersistentVolume:
        """Delete the claim of a volume; it is not waited for more."""
        volume = self.volumes()[entry]
        reference = volume.spec.claim_ref
        assert reference is not None
        self.api.delete(
            PersistentVolumeClaim, reference.name, uid=reference.uid, namespace=self.namespace
        )
        return volume

    def use_and_release(self, entry: str) -> PersistentVolume:
        self.bind(entry)
        return self.release(entry)

    def delete_volume(self, volume: PersistentVolume, *, gone_is_fine: bool = False) -> None:
        """By hand, with whatever protects it taken off."""
        with contextlib.suppress(*(KubeError,) if gone_is_fine else ()):
            self.api.delete(PersistentVolume, volume.name, uid=volume.uid)
            free = {"metadata": {"uid": volume.uid, "finalizers": None}}
            with contextlib.suppress(NotFound):
                self.api.patch(PersistentVolume, volume.name, free)

    # -- looking and waiting

    def wait_state(self, entry: str, state: str) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            found = self.agent.entries().get(entry)
            return found if found is not None and found["state"] == state else None

        return self.wait(reached, f"{entry} is {state}")

    def events(self, reason: str) -> list[Event]:
        mine = {self.name, *(volume.name for volume in self.volumes().values())}
        return [
            event
            for event in self.api.list_all(Event, namespace="default")
            if event.reason == reason
            and (event.involved_object.name in mine or self.name in event.message
                 or str(self.entries) in event.message)
        ]  # fmt: skip

    def wait_event(self, reason: str) -> Event:
        found: list[Event] = self.wait(lambda: self.events(reason), f"an event {reason}")
        return found[0]

    def wait(self, met: Callable[[], T | None], what: str) -> T:
        found = wait_until(met, what, explain=self._explain)
        assert found is not None
        return found

    def _explain(self) -> str:
        return f"{self.agent.get('/volumes')[1]}\n{self.agent.tail()}"

    def close(self) -> None:
        self.agent.kill()
        sys.stderr.write(self.agent.tail() if self.agent.log.exists() else "")
        for volume in self.volumes().values():
            with contextlib.suppress(KubeError):
                self.delete_volume(volume)
        for kind in self._classes:
            with contextlib.suppress(KubeError):
                self.api.delete(StorageClass, kind.name, uid=kind.uid)
        with contextlib.suppress(KubeError):
            found = self.api.get(NodeObject, self.name)
            self.api.delete(NodeObject, self.name, uid=found.uid)


@pytest.fixture(scope="session")
def api(control_plane: ControlPlane) -> Iterator[Client]:
    client = Client(auth.load(kubeconfig=str(control_plane.kubeconfig)))
    yield client
    client.close()


@pytest.fixture(scope="session")
def shared_proxy(control_plane: ControlPlane) -> Iterator[FaultProxy]:
    with FaultProxy(control_plane) as running:
        yield running


@pytest.fixture
def proxy(shared_proxy: FaultProxy) -> Iterator[FaultProxy]:
    yield shared_proxy
    shared_proxy.clear()


@pytest.fixture
def node(
    api: Client, namespace: str, tmp_path: Path, disks: Any, proxy: FaultProxy
) -> Iterator[Node]:
    """A node without an agent yet: ``configure`` it and start ``agent``."""
    name = f"node-{uuid.uuid4().hex[:12]}"
    entries = tmp_path / "disks"
    entries.mkdir()
    made = Node(api, name, namespace, disks, Agent(name, tmp_path, proxy), proxy, entries)
    made.register()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def block(node: Any) -> Any:
    """A node with one raw disk of 16 MiB, offered, its user's data on it once it is bound."""
    node.class_("-b")
    node.configure(b=node.block())
    disk = node.disks.disk("a", data=SECRET)
    node.link("d", disk)
    node.agent.start()
    node.volume("d")
    node.disk = disk
    return node
