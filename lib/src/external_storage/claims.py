"""Claims: which of them we provision, and what they ask for. Pure; ``provisioning`` acts on it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime

from external_storage.decision import PROCEED, Decision, skip
from external_storage.kube.names import (
    ANN_BETA_STORAGE_PROVISIONER,
    ANN_SELECTED_NODE,
    ANN_STORAGE_PROVISIONER,
    BINDING_WAIT,
    INTENT_FINALIZER,
    MODE_BLOCK,
)
from external_storage.kube.types import PersistentVolumeClaim, StorageClass
from external_storage.persistent_volume import class_name


def requested_provisioner(claim: PersistentVolumeClaim) -> str:
    """The provisioner that the controller manager has asked to serve the claim."""
    annotations = claim.metadata.annotations
    if ANN_STORAGE_PROVISIONER in annotations:
        return annotations[ANN_STORAGE_PROVISIONER]
    return annotations.get(ANN_BETA_STORAGE_PROVISIONER, "")


def selected_node(claim: PersistentVolumeClaim) -> str | None:
    """The node that the scheduler chose for the first pod with the claim."""
    return claim.metadata.annotations.get(ANN_SELECTED_NODE) or None


def is_terminating(claim: PersistentVolumeClaim) -> bool:
    return claim.metadata.deletion_timestamp is not None


def has_intent(claim: PersistentVolumeClaim) -> bool:
    """Whether our finalizer says that something may have been begun for the claim."""
    return INTENT_FINALIZER in claim.metadata.finalizers


def should_provision(
    claim: PersistentVolumeClaim,
    storage_class: StorageClass | None,
    *,
    names: Collection[str],
    node_name: str | None = None,
) -> Decision:
    """Whether the claim waits for a volume of ours at this moment.

    Args:
        names: the provisioner names that we answer to.
        node_name: the only node that we serve, if there is one.
    """
    if is_terminating(claim):
        return skip("the claim is being deleted")
    if claim.spec.volume_name:
        return skip("the claim has a volume")
    if requested_provisioner(claim) not in names:
        return skip("the claim is for another provisioner")
    if storage_class is None:
        return skip("the class does not exist; the claim is woken when it does")
    if storage_class.provisioner not in names:
        return skip("the class is for another provisioner")
    node = selected_node(claim)
    if storage_class.volume_binding_mode == BINDING_WAIT and node is None:
        return skip("no node has been selected")
    if node_name is not None and node != node_name:
        return skip("another node has been selected, or none")
    return PROCEED


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What a provisioner has declared that it can do; ``Provisioner`` explains each."""

    supports_block: bool = False
    supports_clone: bool = False
    supports_volume_attributes: bool = False
    access_modes: Collection[str]


def why_refused(claim: PersistentVolumeClaim, can: Abilities) -> str | None:
    """What the claim asks for that no provisioner, or not this one, can give; None if nothing."""
    spec = claim.spec
    if spec.volume_mode == MODE_BLOCK and not can.supports_block:
        return "volumeMode Block is not supported: use Filesystem"
    refused = [mode for mode in spec.access_modes if mode not in can.access_modes]
    if refused:
        allowed = ", ".join(sorted(can.access_modes))
        return f"accessModes {', '.join(refused)} is not supported: use {allowed}"
    if spec.selector is not None:
        return "spec.selector is not supported: a new volume cannot be picked by labels"
    if spec.volume_attributes_class_name and not can.supports_volume_attributes:
        return "spec.volumeAttributesClassName is not supported"
    return _why_source_refused(claim, can)


def _why_source_refused(claim: PersistentVolumeClaim, can: Abilities) -> str | None:
    reference = claim.spec.data_source_ref
    if reference is not None and reference.namespace:
        return (
            f"spec.dataSourceRef.namespace {reference.namespace!r} is not supported: "
            "the source must be in the claim's own namespace"
        )
    if source_claim(claim) is not None and not can.supports_clone:
        return "cloning is not supported: spec.dataSource must not be a PersistentVolumeClaim"
    return None


def source_claim(claim: PersistentVolumeClaim) -> str | None:
    """The name of the claim whose volume is to be cloned, if that is what is asked for."""
    source = claim.spec.data_source_ref or claim.spec.data_source
    if source is None or source.kind != PersistentVolumeClaim.KIND or source.api_group:
        return None
    return source.name


def populated_from(claim: PersistentVolumeClaim) -> str | None:
    """The kind of data source that a populator, and not a provisioner, is to fill the volume from;
    None if there is no such source."""
    source = claim.spec.data_source_ref or claim.spec.data_source
    if source is None or source_claim(claim) is not None:
        return None
    return f"{source.kind}.{source.api_group}" if source.api_group else source.kind


def source_kind(claim: PersistentVolumeClaim) -> str:
    """The kind of the data source, ``""`` without one: a label of the metrics."""
    return claim.spec.data_source.kind if claim.spec.data_source is not None else ""


def worth_another_try(old: PersistentVolumeClaim, new: PersistentVolumeClaim) -> bool:
    """Whether a change of the claim may make a failed try succeed; other updates may not cut a
    back-off short."""
    return (
        old.spec != new.spec
        or selected_node(old) != selected_node(new)
        or class_name(old) != class_name(new)
        or requested_provisioner(old) != requested_provisioner(new)
        or is_terminating(old) != is_terminating(new)
    )


def index_uid(claim: PersistentVolumeClaim) -> tuple[str, ...]:
    """Index function: claims by UID, the key of the claim queue."""
    return (claim.uid,)


def index_class(claim: PersistentVolumeClaim) -> tuple[str, ...]:
    """Index function: claims without a volume by class, to be woken when the class changes."""
    return () if claim.spec.volume_name else (class_name(claim),)


def age_s(claim: PersistentVolumeClaim) -> float:
    """Seconds since the claim was made, by our own clock and the server's."""
    created = claim.metadata.creation_timestamp
    if created is None:
        return 0.0
    return max((datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds(), 0.0)
