"""The operator's commands beside the running program."""

from __future__ import annotations

from tests.serving import Serving, Users, directory_of, volume_by_hand

from external_storage import PersistentVolume


def test_orphans_and_missing_find_what_has_lost_its_other_half(
    users: Users, serving: Serving
) -> None:
    lost, point = users.bound("lost"), users.bound("point", provisioningMode="efs-ap")
    for command in ("orphans", "missing"):
        code, text = serving.run(command)
        assert (code, text) == (0, "nothing found\n")
    # An access point is deleted in the console, a directory by hand.
    [made] = users.efs.access_points()
    users.efs.delete_access_point(made["AccessPointId"])
    directory_of(users, lost).rmdir()
    code, text = serving.run("missing")
    assert code == 1
    assert {lost.name, point.name} <= set(text.split())


def test_an_orphaned_access_point_is_deleted_when_told(users: Users, serving: Serving) -> None:
    volume = users.bound(provisioningMode="efs-ap")
    # An admin removes the volume by force.
    users.api.patch(PersistentVolume, volume.name, {"metadata": {"finalizers": None}})
    users.api.patch(
        PersistentVolume, volume.name, {"spec": {"persistentVolumeReclaimPolicy": "Retain"}}
    )
    users.delete_claims()
    users.wait(lambda: not users.claims(), "the claim is gone")
    users.api.delete(PersistentVolume, volume.name, uid=volume.uid)
    users.wait_gone(volume)
    [made] = users.efs.access_points()
    code, text = serving.run("orphans")
    assert code == 1
    assert {made["AccessPointId"], volume.name} <= set(text.split())
    assert users.efs.access_points() == [made]
    by_hand = volume_by_hand(users, f"{users.one.id}:/below:{made['AccessPointId']}")
    assert serving.run("orphans", "--delete") == (0, "nothing found\n")
    users.api.delete(PersistentVolume, by_hand.name, uid=by_hand.uid)
    users.wait_gone(by_hand)
    users.efs.denied.add("DeleteAccessPoint")
    code, text = serving.run("orphans", "--delete")
    assert code == 1
    assert "not deleted: AWS denies elasticfilesystem:DeleteAccessPoint" in text
    users.efs.clear_faults()
    code, text = serving.run("orphans", "--delete")
    assert code == 0
    assert f"{made['AccessPointId']}: deleted" in text
    assert users.efs.access_points() == []


def test_the_doctor_finds_what_is_missing(users: Users, serving: Serving) -> None:
    code, text = serving.run("doctor", "--write")
    assert code == 0, text
    assert users.efs.access_points() == []
    users.one.unmount()
    users.efs.denied = {"CreateAccessPoint", "DescribeMountTargets"}
    code, text = serving.run("doctor", "--write")
    assert code == 1
    failed = {line.split("  ")[1].strip() for line in text.splitlines() if line[:6] == "FAILED"}
    other = serving.systems[1].id
    assert failed == {
        f"{users.one.id}: DescribeMountTargets",
        f"{users.one.id}: CreateAccessPoint",
        f"{users.one.id}: mount",
        f"{other}: DescribeMountTargets",
        f"{other}: CreateAccessPoint",
    }
