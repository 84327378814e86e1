"""Publishers of what is left, for a provisioner name that a CSIDriver can have."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from external_storage import (
    AvailableCapacity,
    Context,
    EventRecorder,
    Provisioner,
    Settings,
    StorageClass,
)
from external_storage.author import Author
from external_storage.calls import Calls
from external_storage.capacity import CapacityPublisher
from external_storage.informer import Lister
from external_storage.informer.store import Store
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.names import BINDING_WAIT
from external_storage.kube.types import CSIDriver, CSIStorageCapacity
from external_storage.metrics import Metrics
from external_storage.testing import builders

Left = list[AvailableCapacity] | None


class Pools(Provisioner[Settings, Any]):
    """Has what a test says."""

    def __init__(self, settings: Settings, context: Context) -> None:
        super().__init__(settings, context)
        self.ask: Callable[[StorageClass], Left] = lambda _: [AvailableCapacity(capacity=2**30)]

    def provision(self, request: Any) -> Any:
        raise NotImplementedError

    def delete(self, volume: Any) -> None:
        raise NotImplementedError

    def available_capacity(self, storage_class: StorageClass) -> Left:
        return self.ask(storage_class)


@dataclass
class Bed:
    """A provisioner name, its classes, and publishers whose rounds a test calls."""

    rig: Any
    directory: Path
    client: Client = field(init=False)
    written: list[str] = field(default_factory=list)
    """The verbs of the requests so far that change something."""
    classes: Store[StorageClass] = field(default_factory=Store)

    def __post_init__(self) -> None:
        self.client = self.client_of(self.rig.plane.kubeconfig)

    def client_of(self, kubeconfig: Path) -> Client:
        """A client whose own namespace is the test's."""
        path = homed(kubeconfig, self.rig.namespace, self.directory)
        made = Client(auth.load(kubeconfig=str(path)), observer=self._observe)
        self.rig.stack.callback(made.close)
        return made

    def _observe(self, verb: str, resource: str, _code: str, _seconds: float) -> None:
        if resource == CSIStorageCapacity.RESOURCE and verb not in ("get", "list"):
            self.written.append(verb)

    def driver(self, *, reads_capacity: bool = True) -> None:
        body = {
            "metadata": {"name": self.rig.name},
            "spec": {"attachRequired": False, "storageCapacity": reads_capacity},
        }
        self.rig.api.create(CSIDriver, body)
        self.rig.stack.callback(self.rig.drop, CSIDriver, self.rig.name)

    def add_class(self, name: str, binding_mode: str = BINDING_WAIT) -> StorageClass:
        made = builders.storage_class(
            name=name, provisioner=self.rig.name, binding_mode=binding_mode
        )
        self.classes.apply(made)
        return made

    def pools(self, client: Client, **settings: Any) -> Pools:
        context = Context(
            name=self.rig.name,
            namespace=client.namespace,
            client=client,
            events=EventRecorder(client, self.rig.name),
            metrics=Metrics(),
        )
        return Pools(Settings(provisioner_name=self.rig.name, **settings), context)

    def publisher(
        self, client: Client | None = None, *, timeout_s: float = 60.0, **options: Any
    ) -> tuple[CapacityPublisher, Pools]:
        pools = self.pools(client or self.client)
        context = pools.context
        calls = Calls(overrun_s=0.0)
        calls.start()
        self.rig.stack.callback(calls.stop)
        made = CapacityPublisher(
            provisioner=pools,
            settings=pools.settings,
            client=context.client,
            author=Author(
                provisioner=pools, calls=calls, events=context.events, timeout_s=timeout_s
            ),
            classes=Lister(self.classes),
            metrics=context.metrics,
            abandon=calls.hanging,
            **options,
        )
        return made, pools

    def objects(self) -> list[CSIStorageCapacity]:
        found: list[CSIStorageCapacity] = self.rig.api.list_all(
            CSIStorageCapacity, namespace=self.rig.namespace
        )
        return sorted(found, key=lambda item: (item.storage_class_name, str(item.capacity)))

    def told(self) -> list[tuple[str, str | None]]:
        """Class and capacity of each object."""
        return [(item.storage_class_name, item.capacity) for item in self.objects()]


@pytest.fixture
def rig(rig: Any, tmp_path: Path) -> Any:
    """As always, but with a name that a CSIDriver can have, and at home in its namespace."""
    rig.name = f"{rig.namespace}.example.com"
    rig.plane = SimpleNamespace(kubeconfig=homed(rig.plane.kubeconfig, rig.namespace, tmp_path))
    return rig


def homed(kubeconfig: Path, namespace: str, directory: Path) -> Path:
    """A copy of a kubeconfig whose own namespace is ``namespace``."""
    content = json.loads(kubeconfig.read_text())
    content["contexts"][0]["context"]["namespace"] = namespace
    copy = directory / f"homed-{kubeconfig.name}"
    copy.write_text(json.dumps(content))
    return copy


@pytest.fixture
def bed(rig: Any, tmp_path: Path) -> Bed:
    return Bed(rig, tmp_path)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the publishers have warned of so far, in order."""

    def read() -> list[str]:
        return [
            str(getattr(record, "fields", {})["about"])
            for record in caplog.records
            if record.name == "external_storage.capacity" and record.levelno >= logging.WARNING
        ]

    return read
