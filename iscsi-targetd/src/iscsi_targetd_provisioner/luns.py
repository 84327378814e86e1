"""By what LUN nodes know each volume, also while its host has lost the export."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from external_storage import PersistentVolume
from iscsi_targetd_provisioner.fleet import ANN_SERVER


@dataclass(slots=True)
class KnownLuns:
    """Follows the volumes: ``changed`` is told of each."""

    default: str = ""
    """Server of volumes that do not say theirs."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _luns: dict[str, tuple[str, int]] = field(default_factory=dict)
    """By volume: its server and LUN."""

    def changed(self, before: PersistentVolume | None, after: PersistentVolume | None) -> None:
        volume = after if after is not None else before
        if volume is None:
            return
        with self._lock:
            if after is None or after.spec.iscsi is None:
                self._luns.pop(volume.name, None)
            else:
                server = after.metadata.annotations.get(ANN_SERVER) or self.default
                self._luns[volume.name] = (server, after.spec.iscsi.lun)

    def of_others(self, server: str, volume: str) -> frozenset[int]:
        """The LUNs on a server that are not to be given to a volume."""
        with self._lock:
            known = self._luns.items()
            return frozenset(lun for name, (on, lun) in known if on == server and name != volume)
