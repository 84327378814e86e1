"""Directories and the directories of access points: the program on two mounted file systems.

A tmpfs that says to be of the file system's server stands in the place of each; it is mounted
elsewhere, too, so that it outlives what the tests unmount. One process serves all tests.
"""

from __future__ import annotations

import stat
from typing import Any

import pytest
from tests.serving import PRIVATE, Serving, Users, directory_of

from external_storage import PersistentVolume, PersistentVolumeClaim
from external_storage.kube.names import ANN_GID, ANN_PROVISIONED_BY


def test_a_claim_becomes_a_directory_of_its_own_group_without_a_call_of_aws(users: Users) -> None:
    volume = users.bound()
    name = f"data-{volume.name}"
    assert volume.spec.nfs is not None
    assert (volume.spec.nfs.server, volume.spec.nfs.path) == (users.one.server, f"/{name}")
    assert "nfsvers=4.1" in volume.spec.mount_options
    there = (users.one.top / name).stat()
    assert str(there.st_gid) == volume.metadata.annotations[ANN_GID]
    assert stat.S_IMODE(there.st_mode) == 0o2771
    (users.one.top / name / "file").write_text("data")
    users.delete_claims()
    users.wait_gone(volume)
    assert users.one.shown() == []
    assert users.efs.operations() == {}


def test_unmounted_under_the_running_provisioner_claims_wait_and_nothing_is_on_the_local_disk(
    users: Users,
) -> None:
    storage_class = users.kind()
    users.claim("before", storage_class)
    (before,) = users.wait_bound("before")
    users.one.unmount()
    users.claim("data", storage_class)
    users.delete_claims("before")
    users.wait_told("data", "not mounted")
    users.wait_told(before.name, "not mounted")
    status, health = users.serving.program.get("/healthz?verbose")
    assert (status, "not mounted" in health) == (200, True), health
    assert list(users.one.point.iterdir()) == []
    assert users.one.shown() == [f"before-{before.name}"]
    assert users.get_claim("data").spec.volume_name == ""
    users.one.mount()
    (volume,) = users.wait_bound("data")
    users.wait_gone(before)
    assert users.one.shown() == [f"data-{volume.name}"]


@pytest.mark.parametrize("mode", ["efs-dir", "efs-ap"])
def test_archived_data_is_kept_under_another_name(users: Users, mode: str) -> None:
    volume = users.bound(provisioningMode=mode, onDelete="archive")
    directory = directory_of(users, volume)
    directory.mkdir(exist_ok=True)  # of an access point, as its first mount does
    (directory / "file").write_text("kept")
    users.delete_claims()
    users.wait_gone(volume)
    (archived,) = users.one.shown()
    assert archived.startswith("archived-")
    assert (users.one.top / archived / "file").read_text() == "kept"
    assert users.efs.access_points() == []


def test_retained_data_stays_where_it_is(users: Users) -> None:
    volume = users.bound(onDelete="retain")
    users.delete_claims()
    users.wait_gone(volume)
    assert users.one.shown() == [f"data-{volume.name}"]


def predictable(users: Users, mode: str = "efs-dir", path: str = "shared", **given: str) -> Any:
    """A class whose claims all want one directory."""
    return users.kind(
        provisioningMode=mode, subPathPattern=path, ensureUniqueDirectory="false", **given
    )


@pytest.mark.parametrize(
    ("first", "second"), [("efs-dir", "efs-ap"), ("efs-ap", "efs-dir"), ("efs-dir", "efs-dir")]
)
def test_no_volume_of_any_mode_gets_the_directory_of_another(
    users: Users, first: str, second: str
) -> None:
    users.claim("one", predictable(users, first, "above/shared", onDelete="delete"))
    (volume,) = users.wait_bound("one")
    directory = users.one.top / "above" / "shared"
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "file").write_text("of one")
    paths = {"same": "above/shared", "below": "above/shared/below", "above": "above"}
    for name, path in paths.items():
        users.claim(name, predictable(users, second, path, onDelete="delete"))
    for name in paths:
        users.wait_told(name, f"volume {volume.name}")
    users.delete_claims(*paths)
    users.wait(lambda: len(users.claims()) == 1, "the other claims are gone")
    assert (directory / "file").read_text() == "of one"
    users.delete_claims("one")
    users.wait_gone(volume)
    assert not directory.exists()


def test_the_directory_of_a_volume_of_efs_provisioner_is_nobody_elses(users: Users) -> None:
    old = _old_volume(users, gid=2000)
    name = f"old-{old.name}"
    (users.one.top / name).mkdir()
    for mode in ("efs-dir", "efs-ap"):
        users.claim(mode, predictable(users, mode, name, onDelete="delete"))
        users.wait_told(mode, f"volume {old.name}")
    users.delete_claims()
    users.wait(lambda: not users.claims(), "the claims are gone")
    assert users.one.shown() == [name]
    users.api.patch(PersistentVolume, old.name, {"spec": {"claimRef": {"uid": "gone"}}})
    users.wait_gone(old)


@pytest.mark.parametrize(("on_delete", "stays"), [("delete", False), ("", True)])
def test_the_directory_of_an_access_point_is_removed_only_if_the_class_says_so(
    users: Users, on_delete: str, stays: bool
) -> None:
    volume = users.bound(provisioningMode="efs-ap", onDelete=on_delete)
    directory = directory_of(users, volume)
    directory.mkdir()
    (directory / "file").write_text("data")
    users.delete_claims()
    users.wait_gone(volume)
    assert users.efs.access_points() == []
    assert directory.exists() is stays


@pytest.mark.parametrize("mode", ["efs-dir", "efs-ap"])
def test_an_access_point_of_others_keeps_a_directory_only_from_within(
    users: Users, mode: str
) -> None:
    """An admin's own for all, or for all below a class's basePath, is not in the way."""
    storage_class = users.kind(provisioningMode=mode, onDelete="delete", basePath="/base")
    volumes = []
    for name in ("goes", "kept"):
        users.claim(name, storage_class)
        volumes += users.wait_bound(name)
    goes, kept = (directory_of(users, volume) for volume in volumes)
    for directory in (goes, kept):
        directory.mkdir(exist_ok=True, parents=True)
    for path in ("/", "/base", f"/{(kept / 'below').relative_to(users.one.top)}"):
        users.efs.add_access_points(users.one.id, 1, first_gid=1, path=path)
    users.serving.restart()
    if mode == "efs-dir":
        # For directories AWS is asked for nothing: what was listed for others is all that is known.
        users.claim("other", users.kind(provisioningMode="efs-ap"))
        users.wait_bound("other")
    users.delete_claims()
    users.wait_gone(*volumes)
    assert (goes.exists(), kept.exists()) == (False, True)
    users.wait_told(volumes[1].name, "is kept", "fsap-")


def test_volumes_of_efs_provisioner_are_deleted_and_their_groups_are_not_given_away(
    users: Users,
) -> None:
    old = _old_volume(users, gid=2000)
    directory = users.one.top / f"old-{old.name}"
    directory.mkdir()
    new = users.bound(gidMin="2000", gidMax="2001")
    assert new.metadata.annotations[ANN_GID] == "2001"
    # As soon as it is Released: its claim is gone.
    users.api.patch(PersistentVolume, old.name, {"spec": {"claimRef": {"uid": "gone"}}})
    users.wait_gone(old)
    assert users.one.shown() == [f"data-{new.name}"]


def test_the_file_system_with_the_fewest_volumes_is_chosen(users: Users, serving: Serving) -> None:
    anywhere = users.kind(fileSystemId="")
    for number in range(4):
        users.claim(f"data-{number}", anywhere)
        users.wait_bound(f"data-{number}")
    assert [len(system.shown()) for system in serving.systems] == [2, 2]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("../../etc", ".."),
        ("/etc", "/"),
        (PRIVATE, PRIVATE),
        ("a\nb", "control character"),
    ],
)
def test_a_hostile_name_makes_nothing(users: Users, value: str, told: str) -> None:
    pattern = "${.PVC.annotations.dir}"
    storage_class = users.kind(subPathPattern=pattern, ensureUniqueDirectory="false")
    body = {
        "metadata": {"name": "data", "annotations": {"dir": value}},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": storage_class.name,
            "resources": {"requests": {"storage": "1Mi"}},
        },
    }
    users.api.create(PersistentVolumeClaim, body, namespace=users.namespace)
    users.wait_event("data", "ProvisioningFailed")
    users.wait_told("data", told)
    assert users.one.shown() == []


def _old_volume(users: Users, *, gid: int) -> PersistentVolume:
    """As efs-provisioner wrote them."""
    name = f"pvc-{users.namespace}"
    fields = {
        "metadata": {
            "name": name,
            "annotations": {ANN_GID: str(gid), ANN_PROVISIONED_BY: users.provisioner},
        },
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "capacity": {"storage": "1Mi"},
            "claimRef": {"namespace": users.namespace, "name": "old"},
            "nfs": {"server": users.one.server, "path": f"/old-{name}"},
            "persistentVolumeReclaimPolicy": "Delete",
            "storageClassName": "efs",
        },
    }
    return users.make(PersistentVolume, fields)
