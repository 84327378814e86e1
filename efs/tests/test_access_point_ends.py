"""Which file system an access point is made on, and how it goes."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from tests.access_points import Rig, request, saved

from efs_provisioner.access_point_directories import AccessPointDirectories
from efs_provisioner.file_systems import FileSystem
from efs_provisioner.stored import file_system_of, handle_of
from external_storage import (
    Infeasible,
    Owner,
    PersistentVolume,
    ProvisioningFailed,
    ProvisioningInBackground,
)
from external_storage.shares import Share, ShareDirectories
from external_storage.testing import builders

if TYPE_CHECKING:
    from tests.faulty_efs import FaultyEfs


# -- several file systems


def test_the_one_with_the_fewest_access_points_is_chosen(efs: FaultyEfs) -> None:
    full, empty = efs.make_file_system(), efs.make_file_system()
    efs.add_access_points(full, 3, first_gid=1)
    rig = Rig(efs, full, empty)
    for number in range(7):
        rig.provision(request(f"data-{number}"))
    assert (len(efs.access_points(full)), len(efs.access_points(empty))) == (5, 5)


def full(efs: FaultyEfs, file_system: str) -> None:
    efs.limits[file_system] = 0


def going(efs: FaultyEfs, file_system: str) -> None:
    efs.states[file_system] = "deleting"


def not_there(efs: FaultyEfs, file_system: str) -> None:
    efs.removed.add(file_system)


@pytest.mark.parametrize(
    ("arrange", "told"),
    [
        (full, "no room for another access point"),
        (going, "not available"),
        (not_there, "does not exist"),
    ],
)
def test_a_file_system_that_cannot_be_used_is_passed_over(
    efs: FaultyEfs, arrange: Callable[[FaultyEfs, str], None], told: str
) -> None:
    """It has the fewest, so it would be chosen."""
    bad, good = efs.make_file_system(), efs.make_file_system()
    efs.add_access_points(good, 1, first_gid=1)
    arrange(efs, bad)
    rig = Rig(efs, bad, good)
    volume = rig.provision(request("first"))
    assert volume.source["csi"]["volumeHandle"].startswith(f"{good}::")
    assert len(rig.known.gids(bad)) == 0
    assert rig.known.count(bad) == 0
    with pytest.raises((ProvisioningFailed, Infeasible), match=told):
        rig.provision(request("second", fileSystemId=bad))
    if arrange is not_there:
        return
    arrange(efs, good)
    with pytest.raises(ProvisioningFailed, match=told):
        rig.provision(request("third"))


def test_no_other_file_system_is_tried_after_an_answer_that_was_lost(efs: FaultyEfs) -> None:
    one, other = efs.make_file_system(), efs.make_file_system()
    efs.lost["CreateAccessPoint"] = 1
    with pytest.raises(ProvisioningInBackground):
        Rig(efs, one, other).provision(request())
    assert len(efs.access_points()) == 1


def test_what_was_made_on_one_is_found_whichever_is_tried_next(efs: FaultyEfs) -> None:
    one, other = efs.make_file_system(), efs.make_file_system()
    rig = Rig(efs, one, other)
    efs.lost["CreateAccessPoint"] = 1
    with pytest.raises(ProvisioningInBackground):
        rig.provision(request())
    efs.add_access_points(one, 3, first_gid=1)
    rig.points.refresh()
    volume = rig.provision(request())
    assert volume.source["csi"]["volumeHandle"].startswith(f"{one}::")
    assert efs.access_points(other) == []
    assert len(rig.known.gids(other)) == 0


# -- deleting


def test_deleting_twice_is_a_success(rig: Rig, efs: FaultyEfs) -> None:
    asked = request()
    volume = saved(asked.volume_name, rig.provision(asked))
    for _ in range(2):
        rig.volumes.delete(volume)
    assert efs.access_points() == []
    assert len(rig.known.gids(str(file_system_of(volume, {})))) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields["metadata"].update(name="pvc-of-another"),
        lambda fields: fields["spec"]["csi"].update(driver="another.example.com"),
        lambda fields: fields["spec"]["csi"].update(volumeHandle="fs-01234567"),
        lambda fields: fields["spec"]["csi"].update(volumeHandle="fs-01234567::fsap-01234567"),
    ],
    ids=["name", "driver", "no-access-point", "file-system"],
)
def test_a_forged_volume_deletes_nothing(
    rig: Rig, efs: FaultyEfs, change: Callable[[Any], None]
) -> None:
    asked = request()
    fields = msgspec.to_builtins(saved(asked.volume_name, rig.provision(asked)))
    change(fields)
    with pytest.raises((ProvisioningFailed, Infeasible), match=r"nothing is removed|none of this"):
        rig.volumes.delete(msgspec.convert(fields, PersistentVolume))
    assert len(efs.access_points()) == 1


def test_after_a_restart_a_deletion_is_sure_whose_access_point_it_is(
    rig: Rig, efs: FaultyEfs, file_system: str
) -> None:
    asked = request()
    volume = saved(asked.volume_name, rig.provision(asked))
    Rig(efs, file_system).volumes.delete(volume)
    assert efs.access_points() == []


def test_one_of_another_cluster_is_not_deleted(rig: Rig, efs: FaultyEfs, file_system: str) -> None:
    asked = request()
    volume = saved(asked.volume_name, rig.provision(asked))
    with pytest.raises(ProvisioningFailed, match="nothing is removed"):
        Rig(efs, file_system, cluster="two").volumes.delete(volume)


def test_a_deletion_that_fails_is_tried_again(rig: Rig, efs: FaultyEfs) -> None:
    asked = request()
    volume = saved(asked.volume_name, rig.provision(asked))
    efs.failing["DeleteAccessPoint"] = 1
    efs.lost["DeleteAccessPoint"] = 1
    for _ in range(2):
        with pytest.raises(ProvisioningInBackground):
            rig.volumes.delete(volume)
        assert len(rig.known.gids(str(file_system_of(volume, {})))) == 1
    rig.volumes.delete(volume)
    assert efs.access_points() == []


@pytest.mark.parametrize(
    ("path", "is_refused"),
    [("/volumes", True), ("/volumes/deep", True), ("/volumes/deeper", False), ("/other", False)],
)
def test_an_access_point_never_has_everybodys_directories(path: str, is_refused: bool) -> None:
    """Those of a file system whose directory /volumes/deep is mounted for them."""
    system = FileSystem(id="fs-01234567", server="data", path="/volumes/deep")
    share = Share(system.id, server="data", path=system.path, mount_point=Path("/nowhere"))
    owner = Owner("one", (builders.PROVISIONER,))
    shares = {system.id: ShareDirectories(share, owner=lambda: owner)}
    directories = AccessPointDirectories({system.id: system}, shares, keep_archives_s=None)
    refused = pytest.raises(Infeasible, match="for everybody's directories")
    with refused if is_refused else nullcontext():
        directories.refuse_taken(system.id, path, volume="pvc-1")


# -- many


def test_ten_thousand_access_points_are_listed_once(efs: FaultyEfs, file_system: str) -> None:
    efs.add_access_points(file_system, 9_990, first_gid=50_000)
    rig = Rig(efs, file_system)
    volume = rig.provision(request())
    assert volume.gid == 59_990
    assert efs.operations()["DescribeAccessPoints"] == 10
    assert rig.points.counts() == {file_system: 9_991}


def test_the_handle_of_the_drivers_newer_releases_is_understood() -> None:
    csi = {
        "driver": "efs.csi.aws.com",
        "volumeHandle": f"efs:fs-{uuid.uuid4().hex[:17]}::fsap-01234567",
    }
    volume = msgspec.convert({"spec": {"csi": csi}}, PersistentVolume)
    handle = handle_of(volume)
    assert handle is not None
    assert handle.access_point == "fsap-01234567"
