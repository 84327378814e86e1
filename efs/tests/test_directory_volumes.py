"""Directories as volumes: what making and ending them does on a mounted file system, without a
control plane and without AWS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from tests.access_points import Cluster, saved

import external_storage
from efs_provisioner.access_points import AllAccessPoints
from efs_provisioner.aws import Aws
from efs_provisioner.directory_volumes import DirectoryVolumes
from efs_provisioner.facts import Facts
from efs_provisioner.file_systems import FileSystem
from efs_provisioner.known_volumes import KnownVolumes
from efs_provisioner.parameters import EfsParameters
from efs_provisioner.provisioner import shares_of
from efs_provisioner.stored import place_of
from external_storage import (
    PersistentVolume,
    ProvisionedVolume,
    ProvisioningFailed,
    ProvisionRequest,
)
from external_storage.deadline import NEVER
from external_storage.kube.names import ANN_GID, INTENT_FINALIZER
from external_storage.shares import DirectoryRefused, ShareUnavailable
from external_storage.testing import builders

FIRST, SECOND = "fs-00000001", "fs-00000002"
Request = ProvisionRequest[EfsParameters]
Mount = Callable[[str, str], Path]


class Rig:
    """The volumes of one process, which meets no AWS."""

    def __init__(self, points: dict[str, Path]) -> None:
        systems = {
            id: FileSystem(id=id, server=id, mount_point=point, fs_types=("tmpfs",))
            for id, point in points.items()
        }
        self.points = points
        self.cluster = Cluster()
        owner = external_storage.Owner("one", (builders.PROVISIONER,))
        self.shares = shares_of(systems.values(), owner=lambda: owner, call_limit_s=30)
        self.known = KnownVolumes(file_systems=systems, place_of=lambda v: place_of(v, systems))
        aws = Aws("us-east-1")
        self.volumes = DirectoryVolumes(
            systems,
            self.shares,
            facts=Facts(aws),
            known=self.known,
            points=AllAccessPoints(
                aws, file_systems=systems, owner=cast(Any, None), known=self.known
            ),
            events=cast(Any, self.cluster),
            keep_archives_s=None,
        )

    def start(self) -> None:
        for share in self.shares.values():
            share.start()
            assert share.share.wait_looked_at(60)

    def stop(self) -> None:
        for share in self.shares.values():
            share.stop()

    def provision(self, request: Request) -> ProvisionedVolume:
        return self.volumes.provision(request)

    def bound(self, request: Request) -> PersistentVolume:
        """As the library saves it, and as the watch tells of it."""
        made = self.provision(request)
        volume = saved(request.volume_name, made)
        notes = {**volume.metadata.annotations}
        if made.gid is not None:
            notes[ANN_GID] = str(made.gid)
        meta = msgspec.structs.replace(volume.metadata, annotations=notes)
        volume = msgspec.structs.replace(volume, metadata=meta)
        for share in self.shares.values():
            share.records.publish(volume.name)
        self.known.observe(None, volume)
        return volume

    def shown(self, id: str = FIRST) -> list[str]:
        return sorted(p.name for p in self.points[id].iterdir() if p.name[0] != ".")


@pytest.fixture
def points(mounted: Mount) -> dict[str, Path]:
    return {id: mounted(f"{id}:/", id) for id in (FIRST, SECOND)}


@pytest.fixture
def make(points: dict[str, Path]) -> Iterator[Callable[[], Rig]]:
    made: list[Rig] = []

    def begin(*, start: bool = True) -> Rig:
        made.append(Rig(points))
        if start:
            made[-1].start()
        return made[-1]

    yield begin
    for rig in made:
        rig.stop()


@pytest.fixture
def rig(make: Callable[[], Rig]) -> Rig:
    return make()


def request(name: str, *, after_restart: bool = False, id: str = FIRST, **given: Any) -> Request:
    claim = builders.claim(name=name, namespace="team")
    if after_restart:
        meta = msgspec.structs.replace(claim.metadata, finalizers=(INTENT_FINALIZER,))
        claim = msgspec.structs.replace(claim, metadata=meta)
    parameters = {"fileSystemId": id, **given} if id else given
    return ProvisionRequest(
        volume_name=f"pvc-{claim.uid}",
        claim=claim,
        storage_class=builders.storage_class(),
        parameters=EfsParameters.from_class(parameters),
        capacity=1 << 30,
        selected_node=None,
        deadline=NEVER,
    )


@pytest.mark.parametrize("on_delete", ["delete", "archive", "retain"])
def test_a_deletion_may_be_tried_again(rig: Rig, on_delete: str) -> None:
    """The directory has ended, and the API server has not heard of it."""
    asked = request("data", onDelete=on_delete)
    volume = rig.bound(asked)
    for _ in range(3):
        rig.volumes.delete(volume)
        shown = rig.shown()
        assert len(shown) == (0 if on_delete == "delete" else 1)
        assert all(name.startswith("archived-") for name in shown) is (on_delete != "retain")


def test_no_gid_is_given_twice_in_200_claims_at_once(rig: Rig) -> None:
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda n: rig.provision(request(f"data-{n}")), range(200)))
    assert len({volume.gid for volume in made}) == 200
    assert len({path.stat().st_gid for path in rig.points[FIRST].glob("data-*")}) == 200


def test_the_fixed_group_of_a_class_is_never_one_volumes_own(rig: Rig) -> None:
    one, two = (rig.bound(request(name, gid="2000")) for name in ("one", "two"))
    assert rig.provision(request("own")).gid == 2001
    rig.volumes.delete(one)
    rig.known.observe(one, None)
    narrow: dict[str, Any] = {"gidMin": "2000", "gidMax": "2002"}
    assert rig.provision(request("next", **narrow)).gid == 2002
    with pytest.raises(ProvisioningFailed, match="no gid is free"):
        rig.provision(request("last", **narrow))
    assert two.metadata.annotations[ANN_GID] == "2000"


def test_what_is_refused_keeps_no_group_and_no_directory(rig: Rig) -> None:
    pattern: dict[str, Any] = {"subPathPattern": "x/y"}
    (rig.points[FIRST] / "x").write_text("a file where a directory is wanted")
    for number in range(3):
        with pytest.raises(DirectoryRefused):
            rig.provision(request(f"data-{number}", **pattern))
    assert len(rig.known.gids(FIRST)) == 0
    assert rig.known.count(FIRST) == 0


def test_a_claim_that_may_have_begun_where_nothing_can_be_read_yet_waits(
    make: Callable[..., Rig],
) -> None:
    before = make()
    asked = request("data", id="", after_restart=True)
    before.provision(asked)
    assert len(before.shown()) == 1
    before.stop()
    after = make(start=False)
    second = after.shares[SECOND]
    second.start()
    assert second.share.wait_looked_at(60)
    with pytest.raises(ShareUnavailable, match=FIRST):
        after.provision(asked)
    # One of which nothing was begun can go elsewhere.
    after.provision(request("new", id=""))
    assert (len(after.shown()), len(after.shown(SECOND))) == (1, 1)
    after.shares[FIRST].start()
    assert after.shares[FIRST].share.wait_looked_at(60)
    after.provision(asked)
    assert len(after.shown()) == 1


def test_a_volume_of_efs_provisioner_is_known_also_when_the_name_was_changed_since() -> None:
    aws_name = f"{FIRST}.efs.us-east-1.amazonaws.com"
    system = FileSystem(id=FIRST, server="new-name", aws_name=aws_name)
    fields = {
        "metadata": {"name": "pvc-1"},
        "spec": {"nfs": {"server": aws_name.upper(), "path": "/old-pvc-1"}},
    }
    volume = msgspec.convert(fields, PersistentVolume)
    assert place_of(volume, {FIRST: system}) == (FIRST, "/old-pvc-1")
