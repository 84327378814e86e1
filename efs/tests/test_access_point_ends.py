"""Which file system an access point is made on, and how it goes."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from tests.access_points import Rig, request, saved

from efs_provisioner.stored import file_system_of, handle_of
from external_storage import (
    Infeasible,
    PersistentVolume,
    ProvisioningFailed,
    ProvisioningInBackground,
)

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


def test_a_full_file_system_is_passed_over(efs: FaultyEfs) -> None:
    one, other = efs.make_file_system(), efs.make_file_system()
    efs.add_access_points(other, 1, first_gid=1)
    efs.limit = 1
    rig = Rig(efs, one, other)
    rig.provision(request("first"))
    efs.limit = 2
    rig.provision(request("second"))
    efs.limit = 1
    with pytest.raises(ProvisioningFailed, match="no room for another access point"):
        rig.provision(request("third"))


def test_what_was_made_on_one_is_found_whichever_is_tried_next(efs: FaultyEfs) -> None:
    one, other = efs.make_file_system(), efs.make_file_system()
    rig = Rig(efs, one, other)
    efs.lost["CreateAccessPoint"] = 1
    with pytest.raises(ProvisioningInBackground):
        rig.provision(request())
    efs.add_access_points(one, 3, first_gid=1)
    rig.volumes.refresh()
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
    assert len(rig.known.gids(str(file_system_of(volume)))) == 0


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
        assert len(rig.known.gids(str(file_system_of(volume)))) == 1
    rig.volumes.delete(volume)
    assert efs.access_points() == []


# -- many


def test_ten_thousand_access_points_are_listed_once(efs: FaultyEfs, file_system: str) -> None:
    efs.add_access_points(file_system, 9_990, first_gid=50_000)
    rig = Rig(efs, file_system)
    volume = rig.provision(request())
    assert volume.gid == 59_990
    assert efs.operations()["DescribeAccessPoints"] == 10
    assert rig.volumes.counts() == {file_system: 9_991}


def test_the_handle_of_the_drivers_newer_releases_is_understood() -> None:
    csi = {
        "driver": "efs.csi.aws.com",
        "volumeHandle": f"efs:fs-{uuid.uuid4().hex[:17]}::fsap-01234567",
    }
    volume = msgspec.convert({"spec": {"csi": csi}}, PersistentVolume)
    handle = handle_of(volume)
    assert handle is not None
    assert handle.access_point == "fsap-01234567"
