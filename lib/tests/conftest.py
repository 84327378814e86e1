"""A provisioner under test on the real control plane: ``rig`` starts it, makes claims, waits."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from external_storage import (
    AssetRecord,
    AssetRecords,
    Manager,
    Parameters,
    PersistentVolume,
    PersistentVolumeClaim,
    ProvisionedVolume,
    Provisioner,
    ProvisionRequest,
    Settings,
    StorageClass,
)
from external_storage.controller import ProvisionController
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.errors import KubeError, NotFound
from external_storage.kube.names import ANN_PROVISIONED_BY
from external_storage.kube.types import Event, KubeObject, Node
from external_storage.testing import ControlPlane, FaultProxy

LIMIT_S = 60.0


class FolderSettings(Settings):
    """A directory per volume."""

    root: Path = Path("/nowhere")


class FolderParameters(Parameters):
    """One of each kind that matters here."""

    mode: int = 0o770
    root_squash: bool = False


class Folders(Provisioner[FolderSettings, FolderParameters]):
    """Directories as volumes; a test changes what a call does by setting the hooks."""

    def __init__(self, settings: FolderSettings, context: Any) -> None:
        super().__init__(settings, context)
        self.provisioned: list[str] = []
        self.deleted: list[str] = []
        self.requests: list[ProvisionRequest[FolderParameters]] = []
        self.on_provision: Callable[[ProvisionRequest[FolderParameters]], Any] = lambda _: None
        self.on_delete: Callable[[PersistentVolume], None] = lambda _: None
        self.discarded: list[str] = []
        self.reconciled: list[int] = []
        self.keeps_records = False
        self.problem: str | None = None

    def provision(self, request: ProvisionRequest[FolderParameters]) -> ProvisionedVolume:
        self.requests.append(request)
        self.provisioned.append(request.claim.name)
        if self.records is not None:
            self.records.begin(request.volume_name, claim=request.claim)
        made = self.on_provision(request)
        path = self.settings.root / request.volume_name
        path.mkdir(exist_ok=True)
        if isinstance(made, ProvisionedVolume):
            return made
        return ProvisionedVolume(source={"hostPath": {"path": str(path)}})

    def start(self) -> None:
        if self.keeps_records:
            self.records = AssetRecords(self.settings.root.parent / "records")

    def discard(self, record: AssetRecord) -> None:
        assert self.records is not None
        shutil.rmtree(self.settings.root / record.name, ignore_errors=True)
        self.records.forget(record.name)
        self.discarded.append(record.name)

    def reconcile(self, volumes: Sequence[PersistentVolume]) -> None:
        self.reconciled.append(len(volumes))

    def delete(self, volume: PersistentVolume) -> None:
        self.deleted.append(volume.name)
        self.on_delete(volume)
        shutil.rmtree(self.settings.root / volume.name, ignore_errors=True)
        if self.records is not None:
            self.records.forget(volume.name)

    def check(self) -> str | None:
        return self.problem

    def play(self, *outcomes: BaseException | None) -> None:
        """One outcome for each call of ``provision``; the last one for all that follow."""
        left = list(outcomes)

        def play(_request: object) -> None:
            outcome = left.pop(0) if len(left) > 1 else left[0]
            if outcome is not None:
                raise outcome

        self.on_provision = play

    def assets(self) -> list[str]:
        return sorted(path.name for path in self.settings.root.iterdir())


def wait_until(met: Callable[[], Any], what: str, *, limit_s: float = LIMIT_S) -> Any:
    """Poll until ``met`` returns something true, and return that."""
    deadline = time.monotonic() + limit_s
    while True:
        result = met()
        if result:
            return result
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {limit_s:.0f} s")
        time.sleep(0.05)


@dataclass
class Rig:
    """One provisioner name, its class of the same base name, and claims in one namespace."""

    plane: ControlPlane
    api: Client
    namespace: str
    root: Path
    stack: ExitStack
    name: str = ""
    methods: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """Optional methods of the contract that the provisioner has in this test."""
    provisioner: Folders = field(init=False)
    manager: Manager = field(init=False)

    def start(self, declare: Mapping[str, Any] | None = None, **settings: str) -> Folders:
        """A provisioner of our name, running in this process; fast retries unless told.

        ``declare`` sets its attributes before it starts.
        """
        texts = {
            "provisioner_name": self.name,
            "root": str(self.root),
            "retry_interval_start": "0.1",
            "retry_interval_max": "2",
            "leader_elect": "false",
        }
        checked = FolderSettings.from_texts({**texts, **settings})
        config = auth.load(kubeconfig=str(self.plane.kubeconfig))
        built: list[Folders] = []

        class Recorded(Folders):
            def __init__(self, settings: FolderSettings, context: Any) -> None:
                super().__init__(settings, context)
                vars(self).update(declare or {})
                built.append(self)

        for name, method in self.methods.items():
            setattr(Recorded, name, method)
        self.manager = Manager.for_provisioner(Recorded, checked, config)
        self.manager.start()
        self.stack.callback(self.manager.stop)
        self.provisioner = built[0]
        return self.provisioner

    def controller(self) -> ProvisionController:
        """The controller that runs."""
        part = next(part for part in self.manager._parts if part.name == "controller")
        controller: ProvisionController = part.start.__self__  # type: ignore[attr-defined]
        return controller

    def storage_class(self, name: str = "", **fields: Any) -> str:
        """Create a class of ours; its name."""
        name = f"{self.namespace}{name}"
        body = {"metadata": {"name": name}, "provisioner": self.name, **fields}
        made = self.api.create(StorageClass, body)
        self.stack.callback(self.drop, StorageClass, made.name)
        return made.name

    def node(self, name: str = "", **labels: str) -> str:
        """Register a node that no kubelet runs on; its name, also its hostname label."""
        name = f"{self.namespace}{name}"
        body = {"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **labels}}}
        made = self.api.create(Node, body)
        self.stack.callback(self.drop, Node, made.name)
        return made.name

    def claim(self, name: str, storage_class: str, **spec: Any) -> PersistentVolumeClaim:
        annotations = spec.pop("annotations", {})
        body = {
            "metadata": {"name": name, "annotations": annotations},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "storageClassName": storage_class,
                "resources": {"requests": {"storage": "1Gi"}},
                **spec,
            },
        }
        return self.api.create(PersistentVolumeClaim, body, namespace=self.namespace)

    def get_claim(self, name: str) -> PersistentVolumeClaim:
        return self.api.get(PersistentVolumeClaim, name, namespace=self.namespace)

    def bound(self, name: str) -> PersistentVolume:
        """Wait until the claim is Bound; its volume."""

        def is_bound() -> str:
            claim = self.get_claim(name)
            return claim.spec.volume_name if claim.status.phase == "Bound" else ""

        return self.api.get(PersistentVolume, wait_until(is_bound, f"claim {name} is Bound"))

    def is_gone(self, kind: type[KubeObject], name: str, **where: str) -> bool:
        """Whether there is no such object; ``namespace=`` for one that lives in one."""
        return self.api.find(kind, name, **where) is None

    def claim_is_gone(self, name: str) -> bool:
        return self.is_gone(PersistentVolumeClaim, name, namespace=self.namespace)

    def delete_claim(self, name: str) -> None:
        claim = self.get_claim(name)
        self.api.delete(PersistentVolumeClaim, name, uid=claim.uid, namespace=self.namespace)

    def volumes(self) -> list[PersistentVolume]:
        """All volumes of our provisioner name."""
        return [
            volume
            for volume in self.api.list_all(PersistentVolume)
            if volume.metadata.annotations.get(ANN_PROVISIONED_BY) == self.name
        ]

    def events(self, about: str, reason: str = "") -> list[Event]:
        """The events of an object, by name and reason."""
        found = self.api.list_all(Event)
        return [
            event
            for event in found
            if event.involved_object.name == about
            and reason in ("", event.reason)
            and event.source.component == self.name
        ]

    def wait_event(self, about: str, reason: str) -> Event:
        found = wait_until(lambda: self.events(about, reason), f"an event {reason} about {about}")
        event: Event = found[0]
        return event

    def drop(self, kind: type[KubeObject], name: str) -> None:
        try:
            current = self.api.get(kind, name)
            self.api.delete(kind, name, uid=current.uid)
        except NotFound:
            return

    def clean_up(self) -> None:
        """Delete the claims, and whatever volumes the provisioner could not."""
        try:
            for claim in self.api.list_all(PersistentVolumeClaim, namespace=self.namespace):
                with suppress(NotFound):
                    self.api.delete(
                        PersistentVolumeClaim, claim.name, uid=claim.uid, namespace=self.namespace
                    )
        finally:
            self.stack.close()
        for claim in self.api.list_all(PersistentVolumeClaim, namespace=self.namespace):
            # Left by a test that ended with an intent that nobody is to resolve.
            with suppress(KubeError):
                free = {"metadata": {"finalizers": None}}
                self.api.patch(PersistentVolumeClaim, claim.name, free, namespace=self.namespace)
        for volume in self.volumes():
            try:
                self.api.patch(PersistentVolume, volume.name, {"metadata": {"finalizers": None}})
                self.api.delete(PersistentVolume, volume.name, uid=volume.uid)
            except KubeError:
                continue


@pytest.fixture
def api(control_plane: ControlPlane) -> Iterator[Client]:
    """A client with all rights."""
    client = Client(auth.load(kubeconfig=str(control_plane.kubeconfig)))
    yield client
    client.close()


@pytest.fixture
def rig(control_plane: ControlPlane, api: Client, namespace: str, tmp_path: Path) -> Iterator[Rig]:
    """A provisioner name of this test's own; ``start`` it when the test wants it to run."""
    root = tmp_path / "volumes"
    root.mkdir()
    made = Rig(control_plane, api, namespace, root, ExitStack(), name=f"example.com/{namespace}")
    try:
        yield made
    finally:
        made.clean_up()
    leaked = [t.name for t in threading.enumerate() if t.name.startswith(("informer", "claims-"))]
    assert not leaked, f"threads left after stop: {leaked}"


@pytest.fixture
def proxy(control_plane: ControlPlane) -> Iterator[FaultProxy]:
    """Between a client and the API server; without a rule it passes everything on."""
    with FaultProxy(control_plane) as running:
        yield running
    left = [t.name for t in threading.enumerate() if t.name.startswith("faultproxy")]
    assert not left


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[Client]:
    """Through the proxy, as admin; a fresh one has no connection yet."""
    made = Client(auth.load(kubeconfig=str(proxy.kubeconfig())), user_agent="under-test")
    yield made
    made.close()


@pytest.fixture
def until() -> Callable[..., Any]:
    """``wait_until``, for tests that cannot import this file."""
    return wait_until


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """What a test holds by it is let go at its end, whatever the end is."""
    event = threading.Event()
    yield event
    event.set()
