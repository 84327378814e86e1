"""The program on two mounted file systems, and what users and admins do there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faulty_efs import FaultyEfs

from external_storage import PersistentVolume
from external_storage.testing import ProgramProcess, Sandbox

PRIVATE = ".external-storage"


@dataclass
class FileSystem:
    """One that is mounted in our pod."""

    id: str
    server: str
    top: Path
    """Of the whole of it, whether it is mounted for the provisioner or not."""
    point: Path
    """Where the provisioner has it."""

    def mount(self) -> None:
        run("mount", "--bind", self.top, self.point)

    def unmount(self) -> None:
        # Lazily: a worker of the provisioner may be in it.
        run("umount", "--lazy", self.point)

    def shown(self) -> list[str]:
        """What is there beside what is the provisioner's own."""
        return sorted(path.name for path in self.top.iterdir() if path.name != PRIVATE)


@dataclass
class Serving:
    """The process, and how the operator's commands are run beside it."""

    program: ProgramProcess
    systems: Sequence[FileSystem]
    command: tuple[str, ...]
    environment: dict[str, str]

    def restart(self) -> None:
        """What it has learnt is forgotten."""
        self.program.kill()
        self.program.start()

    def run(self, name: str, *flags: str) -> tuple[int, str]:
        """Exit code and output of one of the operator's commands."""
        command = (*self.command[:3], name, *self.command[3:], *flags)
        ran = subprocess.run(
            command,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return ran.returncode, ran.stdout + ran.stderr


@dataclass(kw_only=True)
class Users(Sandbox):
    """What users and admins see and do on the file systems."""

    efs: FaultyEfs
    serving: Serving
    one: FileSystem
    """Of every class that does not say otherwise."""
    _classes: int = field(default=0)

    def kind(self, **parameters: str) -> Any:
        """A class with these parameters."""
        self._classes += 1
        given = {"fileSystemId": self.one.id, **parameters}
        given = {key: value for key, value in given.items() if value}
        return self.storage_class(f"-{self._classes}", parameters=given)

    def bound(self, name: str = "data", **parameters: str) -> PersistentVolume:
        self.claim(name, self.kind(**parameters))
        return self.wait_bound(name)[0]

    def wait_gone(self, *volumes: PersistentVolume) -> None:
        for volume in volumes:
            self.wait(lambda name=volume.name: self.get_volume(name) is None, "the volume is gone")

    def wait_told(self, about: str, *words: str) -> None:
        def told() -> bool:
            return any(all(w in event.message for w in words) for event in self.events(about))

        self.wait(told, f"an event about {about} says {' ... '.join(words)}")


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, timeout=60)


def unmount_all(point: Path) -> None:
    while os.path.ismount(point):
        run("umount", "--lazy", point)


def directory_of(users: Users, volume: PersistentVolume) -> Path:
    """Of a volume of either mode."""
    return users.one.top / volume.metadata.annotations["efs.external-storage/path"].lstrip("/")


def volume_by_hand(users: Users, handle: str) -> PersistentVolume:
    """As an admin makes one for the CSI driver."""
    fields = {
        "metadata": {"name": f"by-hand-{users.namespace}"},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "capacity": {"storage": "1Mi"},
            "csi": {"driver": "efs.csi.aws.com", "volumeHandle": handle},
        },
    }
    return users.make(PersistentVolume, fields)
