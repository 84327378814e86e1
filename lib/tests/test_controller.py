"""The controller on the real control plane: the binder, protection finalizers and RBAC are real."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from external_storage import (
    Ignored,
    PersistentVolume,
    PersistentVolumeClaim,
    ProvisionedVolume,
    ProvisioningFailed,
    StorageClass,
    VolumeInUse,
)
from external_storage.kube.names import ANN_PROVISIONED_BY, ANN_SELECTED_NODE, FINALIZER

Until = Callable[..., Any]


def test_a_claim_becomes_a_volume_that_matches_it(rig: Any) -> None:
    provisioner = rig.start()
    storage_class = rig.storage_class(mountOptions=["noatime"], parameters={"ROOTSQUASH": "true"})
    claim = rig.claim("data", storage_class)
    volume = rig.bound("data")

    assert volume.name == f"pvc-{claim.uid}"
    assert volume.metadata.annotations[ANN_PROVISIONED_BY] == rig.name
    assert FINALIZER in volume.metadata.finalizers
    spec = volume.spec
    assert spec.claim_ref is not None
    assert spec.claim_ref.uid == claim.uid
    assert (spec.claim_ref.namespace, spec.claim_ref.name) == (rig.namespace, "data")
    assert spec.capacity == {"storage": "1Gi"}
    assert spec.access_modes == ("ReadWriteMany",)
    assert spec.mount_options == ("noatime",)
    assert spec.persistent_volume_reclaim_policy == "Delete"
    assert spec.storage_class_name == storage_class
    assert spec.volume_mode == "Filesystem"
    assert provisioner.requests[0].parameters.root_squash is True
    assert provisioner.requests[0].capacity == 2**30
    assert provisioner.provisioned == ["data"]
    rig.wait_event("data", "ProvisioningSucceeded")


def test_deleting_the_claim_removes_asset_and_volume_once(rig: Any, until: Until) -> None:
    provisioner = rig.start()
    storage_class = rig.storage_class()
    rig.claim("data", storage_class)
    volume = rig.bound("data")
    assert provisioner.assets() == [volume.name]
    rig.delete_claim("data")
    until(lambda: not rig.volumes(), "the volume is gone")
    assert provisioner.assets() == []
    assert provisioner.deleted == [volume.name]


def test_a_volume_deleted_before_its_claim_keeps_its_asset_until_the_claim_goes(
    rig: Any, until: Until
) -> None:
    provisioner = rig.start()
    rig.claim("data", rig.storage_class())
    volume = rig.bound("data")
    rig.api.delete(PersistentVolume, volume.name, uid=volume.uid)
    current = rig.api.get(PersistentVolume, volume.name)
    assert current.metadata.deletion_timestamp is not None
    assert provisioner.assets() == [volume.name]
    rig.delete_claim("data")
    until(lambda: not rig.volumes(), "the volume is gone")
    assert provisioner.assets() == []


def test_retain_keeps_asset_and_volume_and_needs_no_finalizer(rig: Any, until: Until) -> None:
    provisioner = rig.start()
    rig.claim("data", rig.storage_class(reclaimPolicy="Retain"))
    volume = rig.bound("data")
    assert FINALIZER not in volume.metadata.finalizers
    rig.delete_claim("data")
    until(
        lambda: rig.api.get(PersistentVolume, volume.name).status.phase == "Released",
        "the volume is Released",
    )
    assert provisioner.assets() == [volume.name]
    assert provisioner.deleted == []


def test_the_finalizer_follows_the_reclaim_policy(rig: Any, until: Until) -> None:
    rig.start()
    rig.claim("data", rig.storage_class())
    volume = rig.bound("data")

    def set_policy(policy: str) -> None:
        patch = {"spec": {"persistentVolumeReclaimPolicy": policy}}
        rig.api.patch(PersistentVolume, volume.name, patch)

    def has_finalizer() -> bool:
        return FINALIZER in rig.api.get(PersistentVolume, volume.name).metadata.finalizers

    set_policy("Retain")
    until(lambda: not has_finalizer(), "the finalizer is removed")
    set_policy("Delete")
    until(has_finalizer, "the finalizer is added")


def test_claims_that_are_not_ours_or_not_ready_are_untouched(rig: Any, until: Until) -> None:
    provisioner = rig.start()
    ours = rig.storage_class()
    foreign = rig.api.create(
        StorageClass,
        {"metadata": {"name": f"{rig.namespace}-foreign"}, "provisioner": "example.com/other"},
    )
    waiting = rig.storage_class("-wait", volumeBindingMode="WaitForFirstConsumer")
    rig.claim("foreign", foreign.name)
    rig.claim("taken", ours, volumeName="some-volume")
    rig.claim("waiting", waiting)
    rig.claim("late", ours)
    rig.bound("late")
    assert provisioner.provisioned == ["late"]
    chosen = rig.node()
    node = {"metadata": {"annotations": {ANN_SELECTED_NODE: chosen}}}
    rig.api.patch(PersistentVolumeClaim, "waiting", node, namespace=rig.namespace)
    rig.bound("waiting")
    assert provisioner.requests[-1].selected_node == chosen
    assert provisioner.provisioned == ["late", "waiting"]
    rig.api.delete(StorageClass, foreign.name, uid=foreign.uid)


def test_a_mistyped_parameter_is_one_event_and_a_fixed_class_wakes_the_claim(
    rig: Any, until: Until
) -> None:
    provisioner = rig.start(retry_interval_max="300")
    storage_class = rig.storage_class(parameters={"rootSqush": "true"})
    rig.claim("data", storage_class)
    event = rig.wait_event("data", "ProvisioningFailed")
    assert event.type == "Warning"
    assert "'rootSqush'" in event.message
    assert "mode, rootSquash" in event.message
    assert provisioner.provisioned == []
    assert rig.get_claim("data").status.phase == "Pending"
    # Parameters cannot be changed: an admin deletes the class and creates it again.
    rig.drop(StorageClass, storage_class)
    rig.storage_class(parameters={"rootSquash": "true"})
    rig.bound("data")
    (only,) = rig.events("data", "ProvisioningFailed")
    assert only.count == 1


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"selector": {"matchLabels": {"a": "b"}}}, "selector"),
        ({"volumeMode": "Block"}, "Block"),
        ({"dataSource": {"kind": "PersistentVolumeClaim", "name": "other"}}, "dataSource"),
    ],
)
def test_what_cannot_be_given_is_refused_with_an_event(
    rig: Any, spec: dict[str, Any], word: str
) -> None:
    provisioner = rig.start()
    rig.claim("data", rig.storage_class(), **spec)
    assert word in rig.wait_event("data", "ProvisioningFailed").message
    assert provisioner.provisioned == []


def test_a_failed_try_is_told_and_tried_again(rig: Any) -> None:
    provisioner = rig.start()
    errors = [ProvisioningFailed("the disk is on fire"), ValueError("a defect")]

    def fail_twice(_request: object) -> None:
        if errors:
            raise errors.pop(0)

    provisioner.on_provision = fail_twice
    rig.claim("data", rig.storage_class())
    rig.bound("data")
    assert provisioner.provisioned == ["data"] * 3
    rig.wait_event("data", "ProvisioningSucceeded")
    messages = {event.message for event in rig.events("data", "ProvisioningFailed")}
    assert messages == {"the disk is on fire", "a defect"}


def test_an_ignored_claim_is_left_alone_without_an_event(rig: Any, until: Until) -> None:
    provisioner = rig.start(retry_interval_start="0.01", retry_interval_max="0.01")

    def ignore(request: Any) -> None:
        if request.claim.name == "not-mine":
            raise Ignored("no")

    provisioner.on_provision = ignore
    storage_class = rig.storage_class()
    rig.claim("not-mine", storage_class)
    until(lambda: "not-mine" in provisioner.provisioned, "the claim has been looked at")
    rig.claim("mine", storage_class)
    rig.bound("mine")
    # Once, and again when a controller touches the claim; a retry each 10 ms would be dozens.
    assert provisioner.provisioned.count("not-mine") < 5
    assert not rig.events("not-mine", "ProvisioningFailed")


def test_a_failed_delete_is_told_on_the_volume_and_tried_again(rig: Any, until: Until) -> None:
    provisioner = rig.start()
    errors: list[Exception] = [
        ProvisioningFailed("still mounted by us"),
        VolumeInUse("a pod has it"),
    ]

    def fail_twice(_volume: object) -> None:
        if errors:
            raise errors.pop(0)

    provisioner.on_delete = fail_twice
    rig.claim("data", rig.storage_class())
    volume = rig.bound("data")
    rig.delete_claim("data")
    until(lambda: not rig.volumes(), "the volume is gone")
    assert provisioner.deleted == [volume.name] * 3
    assert rig.wait_event(volume.name, "VolumeFailedDelete").type == "Warning"
    assert rig.wait_event(volume.name, "VolumeInUse").type == "Normal"


def test_a_volume_that_can_never_be_saved_is_undone(rig: Any, until: Until) -> None:
    provisioner = rig.start()
    provisioner.on_provision = lambda _: ProvisionedVolume(source={"nfs": {"server": ""}})
    rig.claim("data", rig.storage_class())
    event = rig.wait_event("data", "ProvisioningFailed")
    assert "cannot be saved" in event.message
    assert provisioner.assets() == []
    assert not rig.volumes()


def test_a_volume_that_does_not_fit_its_claim_is_refused_and_undone(rig: Any) -> None:
    provisioner = rig.start()
    provisioner.on_provision = lambda request: ProvisionedVolume(
        source={"hostPath": {"path": "/x"}}, capacity=request.capacity - 1
    )
    rig.claim("data", rig.storage_class())
    event = rig.wait_event("data", "ProvisioningFailed")
    assert "the claim asks for 1073741824" in event.message
    assert provisioner.assets() == []
    assert not rig.volumes()


def test_our_own_volume_of_a_lost_answer_is_adopted(rig: Any) -> None:
    """The create arrived, its answer did not: the next try finds the volume and is done."""
    provisioner = rig.start()

    def save_behind_its_back(request: Any) -> None:
        body = _volume_for(rig, request.claim, request.claim.uid)
        body["spec"]["hostPath"]["path"] = str(rig.root / request.volume_name)
        rig.api.create(PersistentVolume, body)

    provisioner.on_provision = save_behind_its_back
    rig.claim("data", rig.storage_class())
    rig.bound("data")
    assert provisioner.provisioned == ["data"]
    assert len(rig.volumes()) == 1
    assert provisioner.assets() == [rig.volumes()[0].name]
    rig.wait_event("data", "ProvisioningSucceeded")


def test_a_foreign_volume_of_our_name_is_not_adopted(rig: Any, until: Until) -> None:
    provisioner = rig.start()
    foreign: list[PersistentVolume] = []

    def take_its_name(request: Any) -> None:
        body = _volume_for(rig, request.claim, "11111111-2222-3333-4444-555555555555")
        foreign.append(rig.api.create(PersistentVolume, body))

    provisioner.on_provision = take_its_name
    rig.claim("data", rig.storage_class())
    event = rig.wait_event("data", "ProvisioningFailed")
    assert "belongs to another claim" in event.message
    assert rig.get_claim("data").status.phase == "Pending"
    rig.api.patch(PersistentVolume, foreign[0].name, {"metadata": {"finalizers": None}})
    rig.api.delete(PersistentVolume, foreign[0].name, uid=foreign[0].uid)
    rig.bound("data")
    assert provisioner.provisioned == ["data"], "the asset was there: only the saving is repeated"


def _volume_for(rig: Any, claim: PersistentVolumeClaim, claim_uid: str) -> dict[str, Any]:
    return {
        "metadata": {
            "name": f"pvc-{claim.uid}",
            "annotations": {ANN_PROVISIONED_BY: rig.name},
        },
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "capacity": {"storage": "1Gi"},
            "claimRef": {"namespace": rig.namespace, "name": claim.name, "uid": claim_uid},
            "hostPath": {"path": "/nowhere"},
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": claim.spec.storage_class_name,
        },
    }


def test_a_class_whose_backend_hangs_does_not_hold_up_another_class(rig: Any) -> None:
    provisioner = rig.start(worker_threads="2")
    release = threading.Event()
    slow, quick = rig.storage_class("-slow"), rig.storage_class("-quick")

    def hang(request: Any) -> None:
        if request.storage_class.name == slow:
            release.wait(60)

    provisioner.on_provision = hang
    for number in range(5):
        rig.claim(f"slow-{number}", slow)
    try:
        for number in range(5):
            rig.claim(f"quick-{number}", quick)
        for number in range(5):
            rig.bound(f"quick-{number}")
        assert sum(name.startswith("slow") for name in provisioner.provisioned) == 2
    finally:
        release.set()
    for number in range(5):
        rig.bound(f"slow-{number}")


def test_while_the_backend_says_no_claims_wait_and_an_event_says_why(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("external_storage.provisioning.PAUSE_S", 0.1)
    provisioner = rig.start()
    provisioner.problem = "the array is rebooting"
    rig.claim("data", rig.storage_class())
    event = rig.wait_event("data", "ProvisioningPaused")
    assert "the array is rebooting" in event.message
    assert provisioner.provisioned == []
    provisioner.problem = None
    rig.bound("data")


def _hold(rig: Any, provisioner: Any) -> threading.Event:
    """Make a claim and wait until the provisioner is at work on it; set the event to let it go."""
    entered, release = threading.Event(), threading.Event()

    def wait(_request: object) -> None:
        entered.set()
        release.wait(60)

    provisioner.on_provision = wait
    rig.claim("data", rig.storage_class())
    assert entered.wait(60)
    return release


def test_stop_lets_work_in_progress_end(rig: Any, until: Until) -> None:
    provisioner = rig.start()
    release = _hold(rig, provisioner)
    stopped = threading.Thread(target=rig.manager.stop)
    stopped.start()
    release.set()
    stopped.join(60)
    assert not stopped.is_alive()
    assert [volume.name for volume in rig.volumes()] == provisioner.assets()
    assert len(provisioner.assets()) == 1


def test_survives_an_api_server_that_goes_away_between_asset_and_volume(rig: Any) -> None:
    provisioner = rig.start()
    release = _hold(rig, provisioner)
    rig.plane.stop_apiserver()
    try:
        release.set()
    finally:
        rig.plane.start_apiserver()
    rig.bound("data")
    assert provisioner.provisioned == ["data"], "the asset was there: only the saving is repeated"


def test_an_asset_is_not_leaked_when_its_claim_goes_before_the_volume_is_saved(
    rig: Any, until: Until
) -> None:
    provisioner = rig.start()
    release = _hold(rig, provisioner)
    rig.delete_claim("data")
    release.set()
    until(lambda: provisioner.deleted, "the volume is deleted")
    until(lambda: not rig.volumes(), "the volume is gone")
    assert provisioner.assets() == []


def test_a_restart_picks_up_what_was_left(rig: Any, until: Until) -> None:
    first = rig.start()
    storage_class = rig.storage_class()
    rig.claim("old", storage_class)
    rig.bound("old")
    rig.manager.stop()
    rig.delete_claim("old")
    rig.claim("new", storage_class)
    second = rig.start()
    volume = rig.bound("new")
    until(lambda: second.assets() == [volume.name], "the old asset is gone")
    assert (first.provisioned, second.provisioned) == (["old"], ["new"])
