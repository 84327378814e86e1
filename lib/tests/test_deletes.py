"""How volumes are deleted, and when they are not, on the real control plane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from external_storage import (
    PersistentVolume,
    ProvisioningFailed,
    VolumeInUse,
)

Until = Callable[..., Any]


def test_the_threshold_of_deletes_is_exactly_that_many_tries(rig: Any, until: Until) -> None:
    provisioner = rig.start(failed_delete_threshold="2")

    def refuse(_volume: PersistentVolume) -> None:
        raise ProvisioningFailed("in repair")

    provisioner.on_delete = refuse
    rig.claim("data", rig.storage_class())
    volume = rig.bound("data")
    rig.delete_claim("data")
    until(
        lambda: any("Given up after 2 tries" in e.message for e in rig.events(volume.name)),
        "the admin is told",
    )
    rig.claim("other", provisioner.requests[0].storage_class.name)
    rig.bound("other")
    assert provisioner.deleted == [volume.name] * 2
    provisioner.on_delete = lambda _: None
    change = {"spec": {"mountOptions": ["noatime"]}}
    rig.api.patch(PersistentVolume, volume.name, change)
    until(lambda: rig.is_gone(PersistentVolume, volume.name), "a change of the volume is a new try")


def test_other_names_of_a_predecessor_are_answered_to(rig: Any, until: Until) -> None:
    own = rig.name
    storage_class = rig.storage_class()
    rig.name = f"{own}-new"
    provisioner = rig.start(additional_provisioner_names=own)
    rig.claim("data", storage_class)
    volume = rig.bound("data")
    assert volume.metadata.annotations["pv.kubernetes.io/provisioned-by"] == own
    rig.delete_claim("data")
    until(lambda: provisioner.deleted == [volume.name], "its volume is deleted too")
    until(lambda: rig.is_gone(PersistentVolume, volume.name), "and its object")


def test_a_volume_that_is_deleted_while_it_is_free_goes_and_its_data_stays(
    rig: Any, until: Until
) -> None:
    provisioner = rig.start()
    rig.claim("data", rig.storage_class())
    volume = rig.bound("data")
    rig.api.patch(
        PersistentVolume, volume.name, {"spec": {"persistentVolumeReclaimPolicy": "Retain"}}
    )
    rig.delete_claim("data")
    until(lambda: rig.api.get(PersistentVolume, volume.name).status.phase == "Released", "released")
    free = {"spec": {"claimRef": None, "persistentVolumeReclaimPolicy": "Retain"}}
    rig.api.patch(PersistentVolume, volume.name, free)
    until(lambda: rig.api.get(PersistentVolume, volume.name).status.phase == "Available", "free")
    held = {
        "metadata": {"finalizers": ["external-provisioner.volume.kubernetes.io/finalizer"]},
        "spec": {"persistentVolumeReclaimPolicy": "Delete"},
    }
    rig.api.patch(PersistentVolume, volume.name, held)
    rig.drop(PersistentVolume, volume.name)
    until(lambda: rig.is_gone(PersistentVolume, volume.name), "the object is not held back")
    assert provisioner.deleted == []
    assert provisioner.assets() == [volume.name]
    assert rig.wait_event(volume.name, "AssetKept").type == "Warning"


def test_a_volume_in_use_does_not_use_up_the_tries_to_delete_it(rig: Any, until: Until) -> None:
    provisioner = rig.start(failed_delete_threshold="2", retry_interval_max="0.2")
    errors: list[Exception] = [VolumeInUse("mounted")] * 4 + [ProvisioningFailed("in repair")]

    def play(_volume: PersistentVolume) -> None:
        if errors:
            raise errors.pop(0)

    provisioner.on_delete = play
    rig.claim("data", rig.storage_class())
    volume = rig.bound("data")
    rig.delete_claim("data")
    until(lambda: rig.is_gone(PersistentVolume, volume.name), "one failure is not two")


def test_a_released_volume_that_an_admin_gives_to_another_claim_is_kept(
    rig: Any, until: Until
) -> None:
    provisioner = rig.start(retry_interval_max="0.2")

    def in_use(_volume: PersistentVolume) -> None:
        raise VolumeInUse("an admin looks at it")

    provisioner.on_delete = in_use
    storage_class = rig.storage_class()
    rig.claim("data", storage_class)
    volume = rig.bound("data")
    rig.delete_claim("data")
    rig.wait_event(volume.name, "VolumeInUse")
    reference = {"namespace": rig.namespace, "name": "rescue", "uid": None, "resourceVersion": None}
    rig.api.patch(PersistentVolume, volume.name, {"spec": {"claimRef": reference}})
    seen: list[Any] = []
    provisioner.on_delete = lambda found: seen.append(found.spec.claim_ref)
    rig.claim("rescue", storage_class, volumeName=volume.name)
    assert rig.bound("rescue").name == volume.name
    assert all(reference.name == "data" for reference in seen)
    assert volume.name in provisioner.assets() or seen
