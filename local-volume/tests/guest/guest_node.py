"""The agent in a guest, on the host's control plane: disks that can be pulled out and replaced."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, TypeVar

from external_storage import PersistentVolume, PersistentVolumeClaim, StorageClass
from external_storage.kube.client import Client
from external_storage.kube.errors import NotFound
from external_storage.kube.types import Event, Node
from external_storage.testing import Disk, Guest
from external_storage.testing.guest import GuestProcess
from external_storage.testing.waiting import wait_until
from local_volume_provisioner.names import LABEL_NODE

T = TypeVar("T")

SIZE: Final = 16 << 20
LIMIT_S: Final = 400.0
PACKAGES: Final = Path(__file__).parents[3] / "lib", Path(__file__).parents[2]
CONFIG: Final = "/etc/provisioner/config"
PORT: Final = 8080
ROOT: Final = "/srv/volumes"
BY_ID: Final = "/dev/disk/by-id"
CLASSES: Final[dict[str, dict[str, str]]] = {
    "raw": {"hostDir": f"{ROOT}/raw", "volumeMode": "Block"},
    "placed": {"hostDir": f"{ROOT}/placed", "volumeMode": "Block", "identity": "placement"},
    "mounts": {"hostDir": f"{ROOT}/mounts"},
    # Nobody links anything here: udev does, when a disk comes.
    "udev": {"hostDir": BY_ID, "volumeMode": "Block", "namePattern": "virtio-auto-*"},
}
# As the program itself, but eight failures in a row take seconds, and not ten minutes.
HASTY: Final = """
import sys
from external_storage import Backoff
from local_volume_provisioner import provisioner
from local_volume_provisioner.__main__ import main
assert isinstance(provisioner._BACKOFF, Backoff)
provisioner._BACKOFF = Backoff(start_s=1.0, max_s=4.0, jitter=0.1)
sys.exit(main())
"""


class GuestNode:
    """A node of the cluster that is the guest: its agent, and what its users do."""

    def __init__(self, guest: Guest, api: Client, kubeconfig: Path) -> None:
        self.guest = guest
        self.api = api
        self.name = f"guest-{uuid.uuid4().hex[:8]}"
        self.namespace = ""
        self.directory = Path()
        """Of the test; its disks are files in it."""
        self.undo = ExitStack()
        """What the test leaves behind is undone with it."""
        self._kubeconfig = guest.kubeconfig(kubeconfig)
        self._url = f"http://127.0.0.1:{guest.forward(PORT)}"
        self._program: GuestProcess | None = None
        self._plugged: set[str] = set()

    def set_up(self) -> None:
        labels = {"kubernetes.io/hostname": self.name}
        self.api.create(Node, {"metadata": {"name": self.name, "labels": labels}})
        classes = {}
        for suffix, fields in CLASSES.items():
            name = f"{self.name}-{suffix}"
            body = {"metadata": {"name": name}, "provisioner": "kubernetes.io/no-provisioner"}
            self.api.create(StorageClass, body)
            classes[name] = {**fields, "mountDir": fields["hostDir"]}
        directories = " ".join(fields["hostDir"] for fields in CLASSES.values())
        self.guest.run(f"mkdir -p {CONFIG} {directories}")
        self.guest.run(f"cat > {CONFIG}/storageClassMap", input=json.dumps(classes))

    def tear_down(self) -> None:
        self.stop_agent()
        for suffix in CLASSES:
            found = self.api.get(StorageClass, f"{self.name}-{suffix}")
            self.api.delete(StorageClass, found.name, uid=found.uid)
        self.api.delete(Node, self.name, uid=self.api.get(Node, self.name).uid)

    # -- the agent

    def start_agent(self, program: Sequence[str] = ("local-volume-provisioner",)) -> None:
        flags = {
            "--node-name": self.name,
            "--kubeconfig": self._kubeconfig,
            "--http-endpoint": f"0.0.0.0:{PORT}",
            "--brake-volumes": "0",
            # A wipe must begin within a minute: on a busy host, two would wait for each other.
            "--parallel-wipes": "1",
        }
        argv = [*program, *(f"{key}={value}" for key, value in flags.items())]
        self._program = self.guest.popen(argv)
        self.wait(lambda: self.get("/readyz") is not None, "the agent is ready")

    def stop_agent(self) -> None:
        """It is to end well, even if it was killed with the guest."""
        if (program := self._program) is None:
            return
        self._program = None
        program.terminate()
        code = program.wait()
        sys.stderr.write(program.output())
        assert code == 0

    def restart_agent(self, *program: str) -> None:
        self.stop_agent()
        self.start_agent(program or ("local-volume-provisioner",))

    def reboot(self) -> None:
        """With the agent running, as it is on a node."""
        assert self._program is not None
        self.guest.reboot()
        sys.stderr.write(self._program.output())
        self._program = None

    def get(self, path: str) -> str | None:
        """What the agent answers; None when it does not, or with an error."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self._url}{path}", timeout=30) as answer:
                text: str = answer.read().decode()
        except OSError:
            return None
        return text

    def entry(self, path: str) -> dict[str, Any]:
        """What the agent shows of it; nothing while it is not known."""
        body = json.loads(self.get("/volumes") or '{"entries": []}')
        found: dict[str, Any] = next((e for e in body["entries"] if e["path"] == path), {})
        return found

    def wait_state(self, path: str, state: str) -> dict[str, Any]:
        def reached() -> dict[str, Any]:
            found = self.entry(path)
            return found if found.get("state") == state else {}

        return self.wait(reached, f"{path} is {state}")

    def wait_pass(self) -> None:
        """Until the agent has looked at everything, from now on."""
        count = "local_volume_provisioner_pass_duration_seconds_count"

        def passes() -> float:
            lines = (self.get("/metrics") or "").splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith(count))

        # Twice: a pass that is under way may have looked before.
        for _ in range(2):
            before = passes()
            self.guest.run(f"touch {ROOT}/raw/look && rm {ROOT}/raw/look")
            self.wait(lambda seen=before: passes() > seen, "the agent has looked")  # type: ignore[misc]

    # -- disks

    def plug(self, image: Path | None = None, **options: Any) -> Disk:
        """A disk that is a file of the host; by default one with somebody's data."""
        disk = self.guest.add_disk(image=image or self.image(), **options)
        self._plugged.add(disk.name)
        self.undo.callback(self.unplug, disk)
        return disk

    def image(self) -> Path:
        """For a disk: ``SIZE`` bytes of random data."""
        path = self.directory / uuid.uuid4().hex
        path.write_bytes(os.urandom(SIZE))
        return path

    def unplug(self, disk: Disk) -> None:
        """Nothing if that has been done."""
        if disk.name in self._plugged:
            self._plugged.remove(disk.name)
            self.guest.remove_disk(disk)

    def link(self, entry: str, target: Disk | str) -> str:
        """``entry``: class and name. The path of the entry."""
        path = f"{ROOT}/{entry}"
        source = self.guest.path(target) if isinstance(target, Disk) else target
        self.guest.run(["ln", "-sfn", source, path])
        self.undo.callback(self.forget, path)
        return path

    # -- volumes and claims

    def volumes(self) -> dict[str, PersistentVolume]:
        """By path."""
        found = self.api.list_all(PersistentVolume, label_selector=f"{LABEL_NODE}={self.name}")
        return {v.spec.local.path: v for v in found if v.spec.local is not None}

    def wait_phase(self, path: str, phase: str, *, other_than: str = "") -> PersistentVolume:
        def found() -> PersistentVolume | None:
            volume = self.volumes().get(path)
            fit = volume is not None and volume.status.phase == phase
            return volume if fit and volume is not None and volume.uid != other_than else None

        volume = self.wait(found, f"the volume of {path} is {phase}")
        assert volume is not None
        return volume

    def bind(self, *paths: str) -> None:
        """A claim for each of these volumes; all Bound, and known to be so."""
        for path in paths:
            volume = self.wait_phase(path, "Available")
            spec = {
                "accessModes": ["ReadWriteOnce"],
                "storageClassName": volume.spec.storage_class_name,
                "volumeMode": volume.spec.volume_mode,
                "volumeName": volume.name,
                "resources": {"requests": {"storage": "1Mi"}},
            }
            metadata = {"name": f"claim-{uuid.uuid4().hex[:8]}"}
            body = {"metadata": metadata, "spec": spec}
            self.api.create(PersistentVolumeClaim, body, namespace=self.namespace)
        for path in paths:
            self.wait_state(path, "Bound")

    def release(self, *paths: str) -> dict[str, str]:
        """Delete the claims of these volumes; the UIDs of those, by path."""
        volumes = self.volumes()
        for path in paths:
            reference = volumes[path].spec.claim_ref
            assert reference is not None
            self.api.delete(
                PersistentVolumeClaim, reference.name, uid=reference.uid, namespace=self.namespace
            )
        return {path: volumes[path].uid for path in paths}

    def wait_cleaned(self, released: dict[str, str]) -> None:
        """Each has a new volume, and an event about its cleaning."""
        for path, uid in released.items():
            self.wait_phase(path, "Available", other_than=uid)
            self.wait_event("Cleaned", path)

    def wait_event(self, reason: str, path: str) -> str:
        """Its message."""

        def said() -> str:
            events = self.api.list_all(Event, namespace="default")
            return next((e.message for e in events if e.reason == reason and path in e.message), "")

        return self.wait(said, f"an event {reason} about {path}")

    def forget(self, *paths: str) -> None:
        """Take these entries away, and then their volumes, so that nothing is cleaned."""
        self.guest.run(["rm", "-f", *(path for path in paths if path.startswith(ROOT))])
        for path, volume in self.volumes().items():
            if path in paths:
                with contextlib.suppress(NotFound):
                    self.api.delete(PersistentVolume, volume.name, uid=volume.uid)
                    free = {"metadata": {"uid": volume.uid, "finalizers": None}}
                    self.api.patch(PersistentVolume, volume.name, free)

    def wait(self, met: Callable[[], T], what: str) -> T:
        return wait_until(met, what, limit_s=LIMIT_S, explain=self._explain)

    def _explain(self) -> str:
        said = self._program.output() if self._program is not None else "it does not run"
        return f"{self.get('/volumes')}\n{said}"


def digest(disk: Disk | Path) -> str:
    """Of all that is on a disk."""
    path = disk if isinstance(disk, Path) else disk.file
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_blank(disk: Disk) -> bool:
    """Whether every byte of it is 0."""
    content = disk.file.read_bytes()
    return content.count(0) == len(content)
