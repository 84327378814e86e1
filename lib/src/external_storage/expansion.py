"""Expansion: claims of expandable classes whose request grew."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from external_storage.author import Author
from external_storage.events import EventRecorder
from external_storage.informer import Lister
from external_storage.kube.client import Client
from external_storage.kube.types import PersistentVolume, PersistentVolumeClaim, StorageClass
from external_storage.metrics import Metrics
from external_storage.provisioner import Provisioner
from external_storage.settings import Settings
from external_storage.workqueue import WorkQueue


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpansionWork:
    """Works the claims that are Bound and want to be larger."""

    provisioner: Provisioner[Any, Any]
    settings: Settings
    client: Client
    author: Author
    queue: WorkQueue[str]
    claims: Lister[PersistentVolumeClaim]
    volumes: Lister[PersistentVolume]
    classes: Lister[StorageClass]
    events: EventRecorder
    metrics: Metrics
    is_mine: Callable[[PersistentVolume], bool]
    clock: Callable[[], float] = time.monotonic

    def needed(self, claim: PersistentVolumeClaim) -> bool:
        """Whether there may be anything to do for the claim in its present state."""
        return False

    def work(self, uid: str) -> None:
        """Called by a worker with the UID of a claim, which may be gone."""
        self.queue.forget(uid)
