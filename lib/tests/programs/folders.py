"""A provisioner for replicas that share a back end, which can tell when two work at once.

Like many real ones, the back end names its assets itself: ``<volume name>.<its own id>``. Making
one is to look for that of an earlier call, then to make it, each taking a while; two replicas that
work on one claim at the same time make two. Each call leaves a line in ``calls``.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path

from external_storage import (
    PersistentVolume,
    ProvisionedVolume,
    Provisioner,
    ProvisionRequest,
    Seconds,
    Settings,
    run,
)
from external_storage.parameters import NoParameters


class FolderSettings(Settings):
    """A directory of folders."""

    root: Path = Path("/nowhere")
    """Directory of the back end, with ``assets`` and ``calls`` in it."""

    latency: Seconds = Seconds(0.1)
    """How long the back end takes for an answer."""


class Folders(Provisioner[FolderSettings, NoParameters]):
    """Folders as volumes."""

    def provision(self, request: ProvisionRequest[NoParameters]) -> ProvisionedVolume:
        self._note("begin", request.volume_name)
        found = list(self._assets().glob(f"{request.volume_name}.*"))
        self._wait()
        path = found[0] if found else self._assets() / f"{request.volume_name}.{uuid.uuid4().hex}"
        path.mkdir(exist_ok=True)
        self._wait()
        self._note("found" if found else "made", request.volume_name)
        return ProvisionedVolume(source={"hostPath": {"path": str(path)}})

    def delete(self, volume: PersistentVolume) -> None:
        self._wait()
        for path in self._assets().glob(f"{volume.name}.*"):
            shutil.rmtree(path)

    def _assets(self) -> Path:
        return self.settings.root / "assets"

    def _wait(self) -> None:
        time.sleep(self.settings.latency / 2)

    def _note(self, what: str, name: str) -> None:
        # One write each: lines of several processes do not mix.
        line = f"{what} {name} {os.getpid()} {time.monotonic():.3f}\n"
        descriptor = os.open(self.settings.root / "calls", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    run(Folders, name="example.com/folders")
