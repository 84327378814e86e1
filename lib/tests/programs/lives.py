"""Starts and stops a controller again and again in one process, and prints what is left of it.

Arguments: kubeconfig, provisioner name, number of lives. Prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

from external_storage import (
    Manager,
    PersistentVolume,
    ProvisionedVolume,
    Provisioner,
    ProvisionRequest,
    Settings,
)
from external_storage.kube import auth
from external_storage.logs import configure
from external_storage.parameters import NoParameters

_WARM_UP = 5


class Nothing(Provisioner[Settings, NoParameters]):
    """Serves its claims from nowhere."""

    worked = threading.Event()

    def provision(self, request: ProvisionRequest[NoParameters]) -> ProvisionedVolume:
        return ProvisionedVolume(source={"hostPath": {"path": f"/nowhere/{request.volume_name}"}})

    def delete(self, volume: PersistentVolume) -> None:
        return

    def reconcile(self, volumes: Sequence[PersistentVolume]) -> None:
        if volumes:
            self.worked.set()


def live(settings: Settings, kubeconfig: str) -> None:
    """One life, long enough to sync and to work."""
    Nothing.worked.clear()
    with Manager.for_provisioner(Nothing, settings, auth.load(kubeconfig=kubeconfig)) as manager:
        assert manager is not None
        if not Nothing.worked.wait(60):
            sys.exit("it has not begun to work")


def main(kubeconfig: str, name: str, lives: int) -> None:
    configure(level="error")
    texts = {"provisioner_name": name, "leader_elect": "false", "http_endpoint": "127.0.0.1:0"}
    settings = Settings.from_texts(texts)
    for _ in range(_WARM_UP):
        live(settings, kubeconfig)
    tracemalloc.start()
    gc.collect()
    before, threads = tracemalloc.get_traced_memory()[0], threading.active_count()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(lives):
        live(settings, kubeconfig)
    gc.collect()
    left = {
        "bytes": tracemalloc.get_traced_memory()[0] - before,
        "threads": threading.active_count() - threads,
        "descriptors": len(list(Path("/proc/self/fd").iterdir())) - descriptors,
    }
    print(json.dumps(left))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
