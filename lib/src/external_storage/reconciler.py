"""Work that no claim drives: what a crash left behind, and the author's own ``reconcile``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from external_storage.assets import AssetState, Records
from external_storage.informer import Lister
from external_storage.kube.types import PersistentVolume
from external_storage.logs import get_logger
from external_storage.provisioner import Provisioner

log = get_logger(__name__)

_RETRY_S = 30.0


class Reconciler:
    """Compares what is there with what should be: once after the start, then now and then."""

    def __init__(
        self,
        provisioner: Provisioner[Any, Any],
        volumes: Lister[PersistentVolume],
        *,
        look_at_claim: Callable[[str], None],
        may_work: Callable[[], bool],
    ) -> None:
        """``look_at_claim`` queues the UID of a claim; ``may_work`` is False on a standby that has
        nothing of its own."""
        self._provisioner = provisioner
        self._volumes = volumes
        self._look_at_claim = look_at_claim
        self._may_work = may_work
        self._stopping = False
        self._wanted = threading.Event()
        self._orphans: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End the loop; False if a call of the author's code goes on after ``timeout_s``."""
        self._stopping = True
        self._wanted.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def soon(self) -> None:
        """Do it as soon as may be; several wishes become one."""
        self._wanted.set()

    def orphans(self) -> int:
        """How many published assets had no volume when this was last looked at."""
        return len(self._orphans)

    def _run(self) -> None:
        while not self._stopping:
            self._wanted.clear()
            pause_s = self._provisioner.reconcile_interval_s
            if self._may_work() and not self._stopping:
                try:
                    self._once()
                except Exception:
                    log.exception("reconciling failed")
                    pause_s = min(pause_s, _RETRY_S)
            self._wanted.wait(pause_s)

    def _once(self) -> None:
        volumes = self._volumes.all()
        if self._provisioner.records is not None:
            names = {volume.name for volume in volumes}
            self._report_orphans(self._provisioner.records, names)
            self._finish(self._provisioner.records, names)
        self._provisioner.reconcile(volumes)

    def _finish(self, records: Records, volumes: set[str]) -> None:
        """Publish what could not be published when it was saved; the rest is its claim's matter."""
        for uid in records.unfinished_claims():
            record = records.unfinished(uid)
            if record is not None and record.name in volumes:
                records.publish(record.name)
            else:
                self._look_at_claim(uid)

    def _report_orphans(self, records: Records, volumes: set[str]) -> None:
        """A published asset has held data: without a volume it is only reported."""
        found = {
            record.name
            for record in records.all()
            if record.state is AssetState.PUBLISHED and record.name not in volumes
        }
        for name in sorted(found - self._orphans):
            log.warning("an asset has no volume any more; it is kept", asset=name)
        self._orphans = found
