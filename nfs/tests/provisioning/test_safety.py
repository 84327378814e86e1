"""Nothing is removed, forgotten or served twice that must not be, whatever state is found."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest

from external_storage import PersistentVolume
from external_storage.kube.names import ANN_PROVISIONED_BY
from nfs_provisioner.provisioner import PROVISIONER_ID


def _bound(deployment: Any) -> Any:
    """The volume of a new claim."""
    deployment.claim("data", deployment.storage_class())
    (volume,) = deployment.wait_bound(1)
    return volume


def test_a_second_process_on_one_export_root_does_not_start(deployment: Any) -> None:
    deployment.start()
    volume = _bound(deployment)
    first, deployment.process = deployment.process, None
    deployment.http_port, deployment.nfs_port = 0, 1
    deployment.start(ready=False)
    assert deployment.process.wait(60) == 1
    assert "in use by another nfs-provisioner" in deployment.tail()
    deployment.process = first
    assert deployment.directories() == [volume.name]


@pytest.mark.parametrize(
    "damage",
    [
        b"{",
        b"{}",
        b'{"name": "NAME", "state": "published", "owner": "x", "claim_uid": "y", "details": {}}',
        b'{"name": "NAME", "state": "published", "owner": "x", "claim_uid": "y",'
        b' "details": {"exportId": "many", "squash": "no_root_squash"}}',
    ],
    ids=["half", "empty", "no details", "bad id"],
)
def test_a_damaged_record_keeps_no_volume_from_being_served(
    deployment: Any, libnfs: Callable[..., Any], damage: bytes
) -> None:
    deployment.start()
    volume = _bound(deployment)
    before = deployment.live_exports()
    assert deployment.stop() == 0
    record = deployment.export_root / ".state" / "volumes" / f"{volume.name}.json"
    record.write_bytes(damage.replace(b"NAME", volume.name.encode()))
    deployment.start()
    assert deployment.live_exports() == before
    libnfs("nfs-ls", deployment.url(volume.spec.nfs.path))


@pytest.mark.parametrize("damage", ["removed", "emptied"])
def test_a_lost_export_file_is_written_again_from_its_record(deployment: Any, damage: str) -> None:
    deployment.start()
    deployment.claim("data", deployment.storage_class(rootSquash="true"))
    (volume,) = deployment.wait_bound(1)
    before = deployment.live_exports()
    file = deployment.export_root / ".state" / "exports.d" / f"{volume.name}.conf"
    text = file.read_text()
    assert deployment.stop() == 0
    if damage == "removed":
        file.unlink()
    else:
        file.write_text("")
    deployment.start()
    assert file.read_text() == text
    assert deployment.live_exports() == before


def test_an_unmounted_disk_is_no_first_start(deployment: Any) -> None:
    deployment.start()
    _bound(deployment)
    assert deployment.stop() == 0
    deployment.export_root.rename(deployment.root / "the-disk")
    deployment.export_root.mkdir()
    deployment.start(ready=False)
    assert deployment.process.wait(60) == 1
    assert "is the disk mounted?" in deployment.tail()
    (deployment.export_root / ".state" / "lock").unlink()
    (deployment.export_root / ".state" / "identity").write_text(f"{uuid.uuid4()}\n")
    deployment.start()
    assert deployment.stop() == 0


def test_an_identity_that_is_no_uuid_is_refused(deployment: Any) -> None:
    deployment.start()
    assert deployment.stop() == 0
    (deployment.export_root / ".state" / "identity").write_text("")
    deployment.start(ready=False)
    assert deployment.process.wait(60) == 1
    assert "is no UUID" in deployment.tail()


@pytest.mark.parametrize("path", ["/export/backup", "/export/pvc-other"])
def test_a_forged_volume_removes_no_directory(
    deployment: Any, wait_until: Callable[..., None], path: str
) -> None:
    deployment.start()
    identity = (deployment.export_root / ".state" / "identity").read_text().strip()
    (deployment.export_root / "backup").mkdir()
    forged = {
        "metadata": {
            "name": "backup",
            "annotations": {ANN_PROVISIONED_BY: deployment.name, PROVISIONER_ID: identity},
        },
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "capacity": {"storage": "1Mi"},
            "claimRef": {"namespace": "default", "name": "gone", "uid": str(uuid.uuid4())},
            "nfs": {"server": "127.0.0.1", "path": path},
            "persistentVolumeReclaimPolicy": "Delete",
        },
    }
    deployment.api.create(PersistentVolume, forged)
    wait_until(lambda: deployment.events("backup", "VolumeFailedDelete"), what="an event")
    (event, *_) = deployment.events("backup", "VolumeFailedDelete")
    assert "nothing is removed" in event.message
    assert deployment.directories() == ["backup"]


def test_a_failed_export_leaves_nothing_when_its_claim_is_deleted(
    deployment: Any, wait_until: Callable[..., None]
) -> None:
    deployment.start()
    # Ganesha refuses to export what it cannot open: a directory in the place of its file.
    files = deployment.export_root / ".state" / "exports.d"
    files.chmod(0o500)
    staging = deployment.export_root / ".state" / "exports.tmp"
    staging.rmdir()
    deployment.claim("data", deployment.storage_class())
    wait_until(lambda: deployment.events("data", "ProvisioningFailed"), what="an event")
    deployment.delete_claims()
    wait_until(lambda: not deployment.claims(), what="the claim is gone")
    wait_until(lambda: not deployment.directories(), what="the directory is gone")
    assert deployment.records() == []
    assert deployment.export_files() == []
