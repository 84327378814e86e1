"""The author's code, called: with a deadline, watched, and nowhere else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from external_storage.assets import AssetRecord
from external_storage.calls import Calls
from external_storage.deadline import Deadline
from external_storage.errors import (
    ProvisionerError,
    ProvisioningFailed,
    ProvisioningInBackground,
    Unchanged,
    VolumeInUse,
    meant,
)
from external_storage.events import EventRecorder
from external_storage.kube.types import KubeObject, PersistentVolume, StorageClass
from external_storage.provisioner import (
    AvailableCapacity,
    Expanded,
    ProvisionedVolume,
    Provisioner,
    ProvisionRequest,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Author:
    """Calls into one provisioner; each raises what the author's code raises."""

    provisioner: Provisioner[Any, Any]
    calls: Calls
    events: EventRecorder
    timeout_s: float
    clock: Callable[[], float] = time.monotonic
    _sources: dict[str, str] = field(default_factory=dict)
    """By the UID of a claim: the volume that is being cloned for it."""
    _busy: set[str] = field(default_factory=set)
    """Names of volumes that are being deleted or expanded: never both at once."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def provision(self, request: ProvisionRequest[Any]) -> ProvisionedVolume:
        """``request`` with a deadline of its own."""
        deadline = self._deadline()
        with self._cloning(request), self._call(request.claim, "provision", deadline):
            return self.provisioner.provision(replace(request, deadline=deadline))

    def delete(self, volume: PersistentVolume) -> None:
        busy = VolumeInUse("an expansion of the volume is going on")
        cloned = VolumeInUse("a clone of the volume is being made")
        with (
            self._alone(volume, busy, cloned=cloned),
            self._call(volume, "delete", self._deadline()),
        ):
            self.provisioner.delete(volume)

    def expand(self, volume: PersistentVolume, capacity: int) -> Expanded:
        busy = Unchanged("the volume is being deleted")
        with self._alone(volume, busy), self._call(volume, "expand", self._deadline()):
            return self.provisioner.expand(volume, capacity)

    def discard(self, record: AssetRecord) -> None:
        with self.calls.call("discard", record.name, self._deadline(), tell=lambda _: None):
            self.provisioner.discard(record)

    def available_capacity(self, storage_class: StorageClass) -> list[AvailableCapacity]:
        """Empty for who does not know."""
        with self._call(storage_class, "available_capacity", self._deadline()):
            return list(self.provisioner.available_capacity(storage_class) or ())

    def _deadline(self) -> Deadline:
        return Deadline(self.clock() + self.timeout_s, self.clock)

    @contextmanager
    def _call(self, about: KubeObject, what: str, deadline: Deadline) -> Iterator[None]:
        def tell(seconds: float) -> None:
            text = f"{what}: the back end has not answered for {seconds:.0f} s; it is waited for"
            self.events.warning(about, "BackendStuck", text)

        with self.calls.call(what, about.key, deadline, tell=tell):
            yield

    @contextmanager
    def _alone(
        self,
        volume: PersistentVolume,
        busy: ProvisionerError,
        *,
        cloned: ProvisionerError | None = None,
    ) -> Iterator[None]:
        with self._lock:
            if cloned is not None and volume.name in self._sources.values():
                raise cloned
            if volume.name in self._busy:
                raise busy
            self._busy.add(volume.name)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(volume.name)

    @contextmanager
    def _cloning(self, request: ProvisionRequest[Any]) -> Iterator[None]:
        """Keeps the source from being deleted, until the call is known to have ended."""
        source, uid = request.source_volume, request.claim.uid
        if source is None:
            yield
            return
        with self._lock:
            if source.name in self._busy:
                raise ProvisioningFailed(f"the source volume {source.name} is busy")
            was_open = uid in self._sources
            self._sources[uid] = source.name
        goes_on = False
        try:
            yield
        except BaseException as error:
            cause = meant(error)
            goes_on = isinstance(cause, ProvisioningInBackground) or (
                isinstance(cause, Unchanged) and was_open
            )
            raise
        finally:
            if not goes_on:
                with self._lock:
                    self._sources.pop(uid, None)
