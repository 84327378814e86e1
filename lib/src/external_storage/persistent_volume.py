"""From what an author returned to the PersistentVolume that is saved.

The author says where the data is; everything the claim and its class decide is set here, once for
all provisioners, and a volume that would not match its claim is refused.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NoReturn

import msgspec

from external_storage.kube import quantity
from external_storage.kube.names import (
    ANN_BETA_STORAGE_CLASS,
    ANN_GID,
    ANN_MIGRATED_TO,
    ANN_PROVISIONED_BY,
    FINALIZER,
    POLICY_DELETE,
)
from external_storage.kube.types import (
    PersistentVolume,
    PersistentVolumeClaim,
    StorageClass,
    VolumeSpec,
)
from external_storage.parameters import Parameters
from external_storage.provisioner import ProvisionedVolume, ProvisionRequest

# Set by the library from the claim and the class; an author who returns one of them is mistaken.
_OURS = frozenset(
    {
        "accessModes",
        "capacity",
        "claimRef",
        "mountOptions",
        "nodeAffinity",
        "persistentVolumeReclaimPolicy",
        "storageClassName",
        "volumeAttributesClassName",
        "volumeMode",
    }
)


class UnfitVolume(Exception):
    """What the author returned cannot become the volume of this claim: a defect of theirs.

    ``fields`` is what the volume would have been, for undoing the asset.
    """

    def __init__(self, text: str, fields: dict[str, Any]) -> None:
        super().__init__(text)
        self.fields = fields


def build_volume(request: ProvisionRequest[Parameters], made: ProvisionedVolume) -> dict[str, Any]:
    """The fields of the PersistentVolume for ``request``; ``UnfitVolume`` if it would not match."""
    claim, storage_class = request.claim, request.storage_class
    policy = storage_class.reclaim_policy
    metadata: dict[str, Any] = {
        "name": request.volume_name,
        "labels": dict(made.labels),
        "annotations": {**made.annotations, ANN_PROVISIONED_BY: storage_class.provisioner},
    }
    if made.gid is not None:
        metadata["annotations"][ANN_GID] = str(made.gid)
    if policy == POLICY_DELETE:
        metadata["finalizers"] = [FINALIZER]
    capacity = request.capacity if made.capacity is None else made.capacity
    spec: dict[str, Any] = {
        **made.source,
        "accessModes": list(claim.spec.access_modes),
        "capacity": {"storage": quantity.from_bytes(capacity)},
        "claimRef": claim_reference(claim),
        "mountOptions": [*made.mount_options, *storage_class.mount_options],
        "persistentVolumeReclaimPolicy": policy,
        "storageClassName": class_name(claim),
        "volumeMode": claim.spec.volume_mode or "Filesystem",
    }
    if request.volume_attributes is not None:
        spec["volumeAttributesClassName"] = request.volume_attributes.name
    if made.node_affinity is not None:
        spec["nodeAffinity"] = msgspec.to_builtins(made.node_affinity)
    elif storage_class.allowed_topologies:
        spec["nodeAffinity"] = {"required": {"nodeSelectorTerms": _terms(storage_class)}}
    fields = {"metadata": metadata, "spec": spec}
    unfit = _why_unfit(request, made)
    if unfit is not None:
        raise UnfitVolume(unfit, fields)
    return fields


def is_ours(volume: PersistentVolume, names: Collection[str]) -> bool:
    """Whether the volume was provisioned by, or has been handed over to, one of these provisioner
    names. A CSI volume that an admin made by hand is not: nobody asked us to delete it."""
    annotations = volume.metadata.annotations
    return any(annotations.get(key) in names for key in (ANN_PROVISIONED_BY, ANN_MIGRATED_TO))


def as_volume(fields: dict[str, Any]) -> PersistentVolume:
    """The typed view of fields that have not been saved."""
    return msgspec.convert(fields, PersistentVolume)


def is_same_asset(fields: dict[str, Any], existing: PersistentVolume) -> bool:
    """Whether a saved volume leads to the asset that ``fields`` describe.

    Compared are the source, as far as its type is one of ours, and the author's annotations.
    """
    annotations = existing.metadata.annotations
    if any(annotations.get(k) != v for k, v in fields["metadata"]["annotations"].items()):
        return False
    kind = next(iter(fields["spec"].keys() - _OURS))
    if kind not in VolumeSpec.__struct_encode_fields__:
        return True
    saved = msgspec.to_builtins(existing.spec).get(kind)
    if saved is None:
        return False
    # Through the same type: it leaves out what we do not read, and tells lists as tuples.
    wanted = msgspec.to_builtins(as_volume({"spec": {kind: fields["spec"][kind]}}).spec)[kind]
    # The API server fills in defaults, and what is empty may be left out on either side.
    return all((saved.get(k) or None) == (v or None) for k, v in wanted.items())


def class_name(claim: PersistentVolumeClaim) -> str:
    """The class a claim asks for; the annotation of old wins over the field."""
    annotation = claim.metadata.annotations.get(ANN_BETA_STORAGE_CLASS)
    return annotation if annotation is not None else claim.spec.storage_class_name or ""


def claim_reference(claim: PersistentVolumeClaim) -> dict[str, str]:
    """The ``claimRef`` that reserves a volume for exactly this claim."""
    return {
        "apiVersion": claim.API_VERSION,
        "kind": claim.KIND,
        "namespace": claim.namespace,
        "name": claim.name,
        "uid": claim.uid,
        "resourceVersion": claim.metadata.resource_version,
    }


def _terms(storage_class: StorageClass) -> list[dict[str, Any]]:
    """The nodes of ``allowedTopologies``, as a volume says it: what the class promises to its users
    holds for a volume whose author has no say in where it can be used."""
    return [
        {
            "matchExpressions": [
                {"key": label.key, "operator": "In", "values": list(label.values)}
                for label in term.match_label_expressions
            ]
        }
        for term in storage_class.allowed_topologies
    ]


def _why_unfit(request: ProvisionRequest[Parameters], made: ProvisionedVolume) -> str | None:
    """Why what the author returned cannot become the volume of this claim, or None."""
    if len(made.source) != 1 or _OURS & made.source.keys():
        got = ", ".join(sorted(made.source)) or "nothing"
        return f"the source must be one volume type such as nfs or csi; got {got}"
    if made.capacity is not None and made.capacity < request.capacity:
        return f"the volume has {made.capacity} bytes, the claim asks for {request.capacity}"
    try:
        msgspec.json.encode(made.source, enc_hook=_refuse)
    except TypeError as error:
        return f"the source cannot be written as JSON: {error}"
    return None


def _refuse(value: object) -> NoReturn:
    raise TypeError(f"{value!r} is a {type(value).__name__}")
