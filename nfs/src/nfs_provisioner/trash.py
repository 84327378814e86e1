"""Emptying the trash behind the deletes, so that a big tree does not hold up its delete."""

from __future__ import annotations

import threading

from external_storage.logs import get_logger
from nfs_provisioner.directories import VolumeDirectories

log = get_logger(__name__)

INTERVAL_S = 300.0


class TrashCollector:
    """One thread that empties the trash when it is woken, and now and then."""

    def __init__(self, directories: VolumeDirectories) -> None:
        self._directories = directories
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trash", daemon=True)

    def start(self) -> None:
        self._wanted.set()
        self._thread.start()

    def wake(self) -> None:
        self._wanted.set()

    def stop(self) -> None:
        """Does not wait for a big tree: what is left is removed after the next start."""
        self._stopping.set()
        self._wanted.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wanted.wait(INTERVAL_S)
            self._wanted.clear()
            if self._stopping.is_set():
                return
            try:
                self._directories.empty_trash(self._stopping.is_set)
            except Exception:
                log.exception("the trash cannot be emptied")
