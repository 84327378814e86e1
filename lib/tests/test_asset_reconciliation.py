"""What a crash or an unlucky deletion leaves in the backend, on the real control plane."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from external_storage import AssetRecords, AssetState, PersistentVolume, ProvisioningFailed
from external_storage.testing import FaultProxy, builders

Until = Callable[..., Any]
RECORDED = {"keeps_records": True, "reconcile_interval_s": 0.2}


def records(rig: Any) -> AssetRecords:
    return AssetRecords(rig.root.parent / "records")


def test_a_claim_deleted_while_we_were_down_leaves_nothing(rig: Any, until: Until) -> None:
    claim = rig.claim("data", "no-such-class")
    name = f"pvc-{claim.uid}"
    records(rig).begin(name, claim=claim)
    (rig.root / name).mkdir()
    rig.delete_claim("data")
    provisioner = rig.start(declare=RECORDED)
    until(lambda: provisioner.discarded == [name], "the asset is discarded")
    assert provisioner.assets() == []
    until(lambda: not records(rig).all(), "its record too")


def test_an_asset_whose_claim_is_there_is_kept(rig: Any, until: Until) -> None:
    claim = rig.claim("data", "no-such-class")
    name = f"pvc-{claim.uid}"
    records(rig).begin(name, claim=claim)
    provisioner = rig.start(declare=RECORDED)
    until(lambda: len(provisioner.reconciled) >= 3, "three rounds")
    assert provisioner.discarded == []
    assert [record.name for record in records(rig).all()] == [name]


def test_an_asset_whose_volume_was_saved_is_published_and_not_discarded(
    rig: Any, until: Until
) -> None:
    """Killed between saving the volume and publishing the record, and the claim deleted since."""
    first = rig.start(declare=RECORDED)
    rig.claim("data", rig.storage_class(reclaimPolicy="Retain"))
    volume = rig.bound("data")
    rig.manager.stop()
    claim = rig.get_claim("data")
    records(rig).begin(volume.name, claim=claim)
    rig.delete_claim("data")
    provisioner = rig.start(declare=RECORDED)
    until(lambda: len(provisioner.reconciled) >= 3, "three rounds")
    assert (first.discarded, provisioner.discarded) == ([], [])
    assert [record.state for record in records(rig).all()] == [AssetState.PUBLISHED]
    assert provisioner.assets() == [volume.name]


def test_a_claim_deleted_between_two_tries_leaves_nothing(rig: Any, until: Until) -> None:
    provisioner = rig.start(declare={"keeps_records": True}, retry_interval_start="1")

    def half_done(request: Any) -> None:
        (provisioner.settings.root / request.volume_name).mkdir(exist_ok=True)
        raise ProvisioningFailed("the disk is full")

    provisioner.on_provision = half_done
    claim = rig.claim("data", rig.storage_class())
    until(lambda: provisioner.provisioned, "the first try")
    rig.delete_claim("data")
    until(lambda: provisioner.discarded == [f"pvc-{claim.uid}"], "the asset is discarded")
    assert provisioner.assets() == []


def test_a_claim_that_cannot_be_asked_for_keeps_its_asset(
    proxy: FaultProxy, rig: Any, until: Until
) -> None:
    rig.plane = SimpleNamespace(kubeconfig=proxy.kubeconfig())
    gone = builders.claim(namespace=rig.namespace)
    records(rig).begin("pvc-gone", claim=gone)
    rule = proxy.on("get", "persistentvolumeclaims", times=3).fail(500)
    provisioner = rig.start(declare=RECORDED)
    until(lambda: rule.applied == 3, "three answers that say nothing")
    until(lambda: provisioner.discarded == ["pvc-gone"], "then it is discarded")


def test_a_published_asset_without_a_volume_is_reported_and_kept(rig: Any, until: Until) -> None:
    claim = builders.claim(namespace=rig.namespace)
    made = records(rig)
    made.begin("pvc-lost", claim=claim)
    made.publish("pvc-lost")
    (rig.root / "pvc-lost").mkdir()
    provisioner = rig.start(declare=RECORDED)
    registry = provisioner.context.metrics.registry
    until(
        lambda: registry.get_sample_value("external_storage_orphaned_assets") == 1,
        "it is reported",
    )
    until(lambda: len(provisioner.reconciled) >= 3, "three rounds")
    assert provisioner.discarded == []
    assert provisioner.assets() == ["pvc-lost"]


def test_an_asset_that_cannot_be_discarded_is_tried_again(
    rig: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = builders.claim(namespace=rig.namespace)
    records(rig).begin("pvc-gone", claim=claim)
    provisioner = rig.start(declare={"keeps_records": True})
    until(lambda: provisioner.discarded, "the first")
    records(rig)
    assert provisioner.records is not None
    tries = []
    discard = provisioner.discard

    def refuse_twice(record: Any) -> None:
        tries.append(record.name)
        if len(tries) < 3:
            raise ProvisioningFailed("in repair")
        discard(record)

    monkeypatch.setattr(provisioner, "discard", refuse_twice)
    provisioner.records.begin("pvc-next", claim=builders.claim(uid="next", namespace=rig.namespace))
    provisioner.context.reconcile_soon()
    until(lambda: provisioner.discarded == ["pvc-gone", "pvc-next"], "discarded at last")
    assert tries == ["pvc-next"] * 3


def test_reconcile_is_called_after_the_sync_again_and_on_demand(rig: Any, until: Until) -> None:
    rig.start()
    rig.claim("data", rig.storage_class())
    volume = rig.bound("data")
    rig.manager.stop()
    provisioner = rig.start(declare={"reconcile_interval_s": 3600.0})
    until(lambda: provisioner.reconciled == [1], "after the sync, with all volumes")
    provisioner.context.reconcile_soon()
    until(lambda: provisioner.reconciled == [1, 1], "on demand")
    assert isinstance(volume, PersistentVolume)


def test_an_asset_that_could_not_be_published_is_not_discarded_under_its_next_user(
    rig: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved, its record not written for a full disk; the volume kept and given to another claim."""
    provisioner = rig.start(declare={"keeps_records": True})
    assert provisioner.records is not None
    publish = provisioner.records.publish

    def full(_name: str) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(provisioner.records, "publish", full)
    rig.claim("data", rig.storage_class(reclaimPolicy="Retain"))
    volume = rig.bound("data")
    rig.delete_claim("data")
    until(lambda: rig.api.get(PersistentVolume, volume.name).status.phase == "Released", "released")
    reference = {"namespace": rig.namespace, "name": "again", "uid": None, "resourceVersion": None}
    rig.api.patch(PersistentVolume, volume.name, {"spec": {"claimRef": reference}})
    rig.claim("again", volume.spec.storage_class_name, volumeName=volume.name)
    rig.bound("again")
    monkeypatch.setattr(provisioner.records, "publish", publish)
    rounds = len(provisioner.reconciled)
    provisioner.context.reconcile_soon()
    until(lambda: len(provisioner.reconciled) > rounds, "a round")
    until(lambda: not provisioner.records.unfinished_claims(), "the record is published")
    assert provisioner.discarded == []
    assert provisioner.assets() == [volume.name]


def test_a_volume_is_deleted_as_one_that_was_saved_also_if_that_was_not_written_down(
    rig: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    provisioner = rig.start(declare={"keeps_records": True})
    assert provisioner.records is not None
    publish, tries = provisioner.records.publish, []

    def full(name: str) -> None:
        tries.append(name)
        raise OSError("no space left on device")

    monkeypatch.setattr(provisioner.records, "publish", full)
    rig.claim("data", rig.storage_class())
    volume = rig.bound("data")
    states = []
    provisioner.on_delete = lambda v: states.append(records(rig).get(v.name))
    saved_with = len(tries)
    rig.delete_claim("data")
    until(lambda: len(tries) > saved_with, "a try to delete it")
    monkeypatch.setattr(provisioner.records, "publish", publish)
    until(lambda: provisioner.assets() == [], "it is deleted")
    assert [record.state for record in states if record] == [AssetState.PUBLISHED]
    assert volume.name in tries
