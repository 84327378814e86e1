"""The pure decisions about claims and volumes."""

import dataclasses
from typing import Any

import pytest

from external_storage.claims import (
    Abilities,
    populated_from,
    requested_provisioner,
    selected_node,
    should_provision,
    why_refused,
    worth_another_try,
)
from external_storage.decision import PROCEED, Decision
from external_storage.kube.names import (
    ACCESS_MODES,
    ANN_BETA_STORAGE_CLASS,
    ANN_BETA_STORAGE_PROVISIONER,
    ANN_MIGRATED_TO,
    ANN_STORAGE_PROVISIONER,
    FINALIZER,
)
from external_storage.kube.types import (
    LabelSelector,
    PersistentVolume,
    PersistentVolumeClaim,
    StorageClass,
    TypedReference,
)
from external_storage.persistent_volume import class_name, is_ours
from external_storage.testing.builders import PROVISIONER, claim, storage_class, volume
from external_storage.volumes import finalizer_change, should_delete, still_wanted

OTHER = "example.com/other"
CLAIM = TypedReference(kind="PersistentVolumeClaim", name="c")
ELSEWHERE = TypedReference(kind="PersistentVolumeClaim", name="c", namespace="there")
SNAPSHOT = TypedReference(api_group="snapshot.storage.k8s.io", kind="VolumeSnapshot", name="s")
WAIT = "WaitForFirstConsumer"
CLASS = storage_class()
NOTHING = Abilities(access_modes=ACCESS_MODES)
BLOCK = Abilities(access_modes=ACCESS_MODES, supports_block=True)


def provision(made: PersistentVolumeClaim, its_class: StorageClass | None = CLASS) -> Decision:
    return should_provision(made, its_class, names=(PROVISIONER,))


def delete(made: PersistentVolume, its_claim: PersistentVolumeClaim | None = None) -> Decision:
    return should_delete(made, its_claim, names=(PROVISIONER,))


def released(**changes: Any) -> PersistentVolume:
    return volume(**{"phase": "Released", **changes})


# -- should_provision


def test_a_claim_that_waits_for_us_is_provisioned() -> None:
    assert provision(claim()) is PROCEED


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (claim(deleting=True), "the claim is being deleted"),
        (claim(volume_name="pvc-1"), "the claim has a volume"),
        (claim(provisioner=OTHER), "the claim is for another provisioner"),
        (claim(provisioner=None), "the claim is for another provisioner"),
    ],
)
def test_a_claim_that_does_not_wait_for_us_is_skipped(
    made: PersistentVolumeClaim, reason: str
) -> None:
    assert provision(made).reason == reason
    assert not provision(made).proceed


def test_a_claim_without_its_class_is_skipped_until_it_is_woken() -> None:
    decision = provision(claim(), None)
    assert not decision.proceed
    assert decision.reason.startswith("the class does not exist")


def test_a_class_that_now_names_another_provisioner_is_not_ours() -> None:
    assert provision(claim(), storage_class(provisioner=OTHER)).reason == (
        "the class is for another provisioner"
    )


@pytest.mark.parametrize(
    ("mode", "node", "proceeds"),
    [
        ("Immediate", None, True),
        ("Immediate", "node-1", True),
        (WAIT, None, False),
        (WAIT, "", False),
        (WAIT, "node-1", True),
    ],
)
def test_a_class_that_waits_for_its_consumer_waits_for_the_node(
    mode: str, node: str | None, proceeds: bool
) -> None:
    decision = provision(claim(selected_node=node), storage_class(binding_mode=mode))
    assert decision.proceed is proceeds
    assert decision.reason == ("" if proceeds else "no node has been selected")


def test_the_annotation_of_old_names_the_provisioner_where_the_new_one_is_missing() -> None:
    beta = claim(provisioner=None, annotations={ANN_BETA_STORAGE_PROVISIONER: PROVISIONER})
    assert provision(beta) is PROCEED
    both = claim(provisioner=OTHER, annotations={ANN_BETA_STORAGE_PROVISIONER: PROVISIONER})
    assert requested_provisioner(both) == OTHER


# -- why_refused


def test_a_plain_claim_is_not_refused() -> None:
    assert why_refused(claim(), NOTHING) is None
    assert why_refused(claim(volume_mode=None), NOTHING) is None


def test_block_mode_is_refused_unless_it_is_supported() -> None:
    block = claim(volume_mode="Block")
    assert why_refused(block, BLOCK) is None
    assert why_refused(block, NOTHING) == ("volumeMode Block is not supported: use Filesystem")


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (claim(selector=LabelSelector()), "spec.selector"),
        (claim(attributes_class="gold"), "spec.volumeAttributesClassName"),
        (claim(access_modes=("Maybe",)), "accessModes"),
        (claim(data_source=CLAIM), "spec.dataSource"),
        (claim(data_source_ref=CLAIM), "spec.dataSource"),
        (claim(data_source_ref=ELSEWHERE), "spec.dataSourceRef.namespace"),
    ],
)
def test_what_no_provisioner_can_give_is_refused_by_its_field(
    made: PersistentVolumeClaim, what: str
) -> None:
    refusal = why_refused(made, BLOCK)
    assert refusal is not None
    assert what in refusal


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (claim(), None),
        (claim(data_source=CLAIM, data_source_ref=CLAIM), None),
        (claim(data_source=SNAPSHOT), "VolumeSnapshot.snapshot.storage.k8s.io"),
        (claim(data_source_ref=TypedReference(kind="Thing", name="x")), "Thing"),
    ],
)
def test_a_source_of_another_kind_is_a_populators(
    made: PersistentVolumeClaim, kind: str | None
) -> None:
    assert populated_from(made) == kind
    assert why_refused(made, Abilities(access_modes=ACCESS_MODES, supports_clone=True)) is None


# -- worth_another_try


@pytest.mark.parametrize(
    "new",
    [
        claim(storage="2Gi"),
        claim(class_name="other"),
        claim(selected_node="node-2"),
        claim(provisioner=OTHER),
        claim(annotations={ANN_BETA_STORAGE_CLASS: "other"}),
    ],
)
def test_spec_node_class_and_provisioner_are_worth_another_try(
    new: PersistentVolumeClaim,
) -> None:
    assert worth_another_try(claim(), new)
    assert worth_another_try(new, claim())


@pytest.mark.parametrize(
    "new",
    [
        claim(resource_version="2"),
        claim(annotations={"example.com/note": "x"}),
        claim(annotations={ANN_BETA_STORAGE_PROVISIONER: OTHER}),
    ],
)
def test_no_other_change_is_worth_another_try(new: PersistentVolumeClaim) -> None:
    assert not worth_another_try(claim(), new)


def test_a_node_that_was_unselected_is_none() -> None:
    assert selected_node(claim(selected_node="")) is None


def test_the_class_annotation_of_old_wins_over_the_field() -> None:
    assert class_name(claim(annotations={ANN_BETA_STORAGE_CLASS: "old"})) == "old"
    assert class_name(claim(annotations={ANN_BETA_STORAGE_CLASS: ""})) == ""
    assert class_name(claim(class_name=None)) == ""


# -- should_delete


def test_a_released_volume_of_ours_is_deleted() -> None:
    assert delete(released()) is PROCEED


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (released(provisioner=OTHER), "the volume is another provisioner's"),
        (released(provisioner=None), "the volume is another provisioner's"),
        (released(phase="Bound"), "the volume is not released"),
        (released(phase="Available"), "the volume is not released"),
        (released(phase=""), "the volume is not released"),
        (released(reclaim_policy="Retain"), "the reclaim policy keeps the volume"),
        (
            released(deleting=True, finalizers=("kubernetes.io/pv-protection",)),
            "the volume is being deleted and nothing of ours is left to do",
        ),
    ],
)
def test_a_volume_that_is_not_ours_to_delete_is_skipped(
    made: PersistentVolume, reason: str
) -> None:
    assert delete(made).reason == reason
    assert not delete(made).proceed


def test_a_volume_that_somebody_deleted_still_loses_its_asset() -> None:
    assert delete(released(deleting=True)) is PROCEED


def test_a_volume_of_an_older_version_without_finalizer_is_deleted() -> None:
    assert delete(released(finalizers=())) is PROCEED


def test_a_volume_that_was_handed_over_to_us_is_ours() -> None:
    handed_over = released(provisioner=OTHER, annotations={ANN_MIGRATED_TO: PROVISIONER})
    assert is_ours(handed_over, PROVISIONER)
    assert delete(handed_over) is PROCEED


def test_a_volume_marked_released_by_mistake_is_kept_for_its_claim() -> None:
    assert delete(released(), claim()).reason == (
        "the volume is marked released while its claim still wants it"
    )


@pytest.mark.parametrize(
    "its_claim", [claim(uid="another"), claim(deleting=True), claim(volume_name="another")]
)
def test_a_claim_that_does_not_want_the_volume_keeps_nothing(
    its_claim: PersistentVolumeClaim,
) -> None:
    assert delete(released(), its_claim) is PROCEED


def test_a_claim_wants_the_volume_it_is_bound_or_about_to_be_bound_to() -> None:
    assert still_wanted(volume(), claim())
    assert still_wanted(volume(), claim(volume_name=volume().name))
    assert not still_wanted(volume(made_for=None), claim())


# -- finalizer_change


@pytest.mark.parametrize(
    ("made", "change"),
    [
        (volume(), None),
        (volume(finalizers=()), True),
        (volume(finalizers=("kubernetes.io/pv-protection",)), True),
        (volume(finalizers=(), phase="Available"), None),
        (volume(finalizers=(), phase="Released"), None),
        (volume(finalizers=(), deleting=True), None),
        (volume(finalizers=(), reclaim_policy="Retain"), None),
        (volume(reclaim_policy="Retain"), False),
        (volume(reclaim_policy="Retain", deleting=True), False),
        (volume(deleting=True), None),
        (volume(finalizers=("other", FINALIZER), phase="Released"), None),
    ],
)
def test_the_finalizer_is_where_an_asset_of_ours_is_to_be_removed(
    made: PersistentVolume, change: bool | None
) -> None:
    assert finalizer_change(made) is change


def test_a_decision_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROCEED.reason = "x"  # type: ignore[misc]


def test_the_beta_annotation_is_not_asked_where_the_other_one_is_empty() -> None:
    made = claim(
        annotations={ANN_STORAGE_PROVISIONER: "", ANN_BETA_STORAGE_PROVISIONER: PROVISIONER}
    )
    assert requested_provisioner(made) == ""
