"""A provisioner in this process, on shares that are directories of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import yaml

from external_storage import (
    Context,
    Deadline,
    Owner,
    PersistentVolume,
    PersistentVolumeClaim,
    ProvisionRequest,
)
from external_storage.metrics import Metrics
from external_storage.provisioner import VolumeHandler
from external_storage.testing import builders, waiting
from external_storage.testing.mounts import found_at
from nfs_client_provisioner.parameters import NfsClientParameters
from nfs_client_provisioner.provisioner import NfsClientProvisioner
from nfs_client_provisioner.settings import NfsClientSettings

PRIVATE = ".external-storage"
OWNER = Owner("a-cluster", (builders.PROVISIONER,))


def entry_for(share: Path, **keys: Any) -> dict[str, Any]:
    """An entry of the file of servers, for a share that is the directory ``share``."""
    there = found_at(share)
    return {
        "server": "nfs.example.com",
        "path": f"/exports/{share.name}",
        "mountPoint": str(share),
        "fsTypes": [there.fs_type],
        "source": there.source,
        **keys,
    }


@pytest.fixture
def share_entry() -> Callable[..., dict[str, Any]]:
    return entry_for


@dataclass
class Told:
    """Stands where the events are written: what was said about what."""

    said: list[tuple[str, str, str]] = field(default_factory=list)

    def normal(self, about: Any, reason: str, message: str) -> None:
        self.said.append((about.name, reason, message))

    warning = normal

    def reasons(self, name: str) -> list[str]:
        return [reason for about, reason, _ in self.said if about == name]


@dataclass
class Site:
    """A provisioner with one share, ``one``, and what surrounds it."""

    share: Path
    provisioner: NfsClientProvisioner
    told: Told
    watching: list[VolumeHandler]

    def request(
        self,
        name: str = "data",
        *,
        namespace: str = "ns",
        capacity: int = 1 << 20,
        labels: dict[str, str] | None = None,
        annotations: dict[str, str] | None = None,
        **parameters: str,
    ) -> ProvisionRequest[NfsClientParameters]:
        claim = claim_of(name, namespace, labels=labels or {}, annotations=annotations or {})
        return ProvisionRequest(
            volume_name=f"pvc-{claim.uid}",
            claim=claim,
            storage_class=builders.storage_class(),
            parameters=NfsClientParameters.from_class(parameters),
            capacity=capacity,
            selected_node=None,
            deadline=Deadline(float("inf")),
        )

    def provision(
        self, request: ProvisionRequest[NfsClientParameters], *, save: bool = True
    ) -> PersistentVolume:
        """The volume as the library saves it; with ``save`` it has been, and was seen."""
        made = self.provisioner.provision(request)
        annotations = dict(made.annotations)
        if made.gid is not None:
            annotations["pv.beta.kubernetes.io/gid"] = str(made.gid)
        fields = {
            "metadata": {"name": request.volume_name, "annotations": annotations},
            "spec": {
                **made.source,
                "capacity": {"storage": str(request.capacity)},
                "claimRef": {"namespace": request.claim.namespace, "name": request.claim.name},
                "mountOptions": list(made.mount_options),
            },
        }
        volume = msgspec.convert(fields, PersistentVolume)
        if save:
            assert self.provisioner.records is not None
            self.provisioner.records.publish(volume.name)
            self.appears(volume)
        return volume

    def appears(self, volume: PersistentVolume) -> None:
        """The cluster has this volume."""
        for handler in self.watching:
            handler(None, volume)

    def vanishes(self, volume: PersistentVolume) -> None:
        """The cluster has it no more."""
        for handler in self.watching:
            handler(volume, None)

    def look(self) -> None:
        """Have the share looked at now, instead of after half a minute."""
        for one in self.provisioner._servers.all():
            one.directories.share.look_anew("a test wants to know", timeout_s=30)

    def directory(self, volume: PersistentVolume) -> Path:
        """The directory of a volume."""
        assert volume.spec.nfs is not None
        return self.share / volume.spec.nfs.path.removeprefix(f"/exports/{self.share.name}/")

    def found(self) -> list[str]:
        """What is right below the base, beside what is ours."""
        return sorted(path.name for path in self.share.iterdir() if path.name != PRIVATE)

    def records(self) -> list[str]:
        return sorted(path.stem for path in (self.share / PRIVATE / "records").glob("*"))


def claim_of(
    name: str, namespace: str, *, labels: dict[str, str], annotations: dict[str, str]
) -> PersistentVolumeClaim:
    metadata = {
        "name": name,
        "namespace": namespace,
        "uid": f"{namespace}-{name}",
        "labels": labels,
        "annotations": annotations,
    }
    return msgspec.convert({"metadata": metadata}, PersistentVolumeClaim)


@pytest.fixture
def site_on(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Makes a ``Site`` on a directory, with keys for its entry in the file of servers."""
    started: list[NfsClientProvisioner] = []

    def make(
        share: Path,
        *,
        flags: dict[str, str] | None = None,
        others: dict[str, Any] | None = None,
        **keys: Any,
    ) -> Site:
        file = tmp_path / f"servers-{len(started)}.yaml"
        file.write_text(
            yaml.safe_dump({"servers": {"one": entry_for(share, **keys), **(others or {})}})
        )
        told, watching = Told(), list[VolumeHandler]()
        context = Context(
            name=builders.PROVISIONER,
            namespace="default",
            client=cast(Any, None),  # nothing but the class of a predecessor's volume is read
            events=cast(Any, told),
            metrics=Metrics(),
            owner=lambda: OWNER,
            watch_volumes=watching.append,
        )
        texts = {"provisioner_name": builders.PROVISIONER, "servers": str(file), **(flags or {})}
        provisioner = NfsClientProvisioner(NfsClientSettings.from_texts(texts), context)
        provisioner.start()
        started.append(provisioner)
        return Site(share, provisioner, told, watching)

    yield make
    for provisioner in started:
        provisioner.stop()


@pytest.fixture
def share(tmp_path: Path) -> Path:
    path = tmp_path / "share"
    path.mkdir()
    return path


@pytest.fixture
def site(site_on: Callable[..., Site], share: Path) -> Site:
    return site_on(share)


@pytest.fixture
def wait_until() -> Callable[..., Any]:
    return waiting.wait_until
