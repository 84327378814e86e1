"""Objects for tests: a claim, a volume and a class that fit together, and a clock that is told.

Each builder has a default for everything, so that a test names only what it is about. Left as they
are, ``claim()``, ``volume()`` and ``storage_class()`` belong to each other: the volume is bound to
the claim, both are of the class, and all three are of the provisioner ``PROVISIONER``.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from external_storage.kube.names import (
    ANN_PROVISIONED_BY,
    ANN_SELECTED_NODE,
    ANN_STORAGE_PROVISIONER,
    FINALIZER,
)
from external_storage.kube.types import (
    ClaimSpec,
    LabelSelector,
    NFSVolumeSource,
    ObjectMeta,
    ObjectReference,
    PersistentVolume,
    PersistentVolumeClaim,
    Resources,
    StorageClass,
    TypedReference,
    VolumeSpec,
    VolumeStatus,
)

__all__ = ["PROVISIONER", "Clock", "claim", "storage_class", "volume"]

PROVISIONER = "example.com/test"
"""Provisioner name of everything built here, unless another one is given."""

_LONG_AGO = "2026-01-01T00:00:00Z"


class Clock:
    """A clock in seconds that goes on only when ``advance`` is called."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass at once."""
        self.now += seconds


def _uid(*names: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(names)))


def _metadata(
    name: str,
    *,
    uid: str,
    resource_version: str,
    namespace: str = "",
    deleting: bool = False,
    annotations: Mapping[str, str | None] | None = None,
    finalizers: tuple[str, ...] = (),
) -> ObjectMeta:
    """Annotations that are None are left out."""
    return ObjectMeta(
        name=name,
        namespace=namespace,
        uid=uid,
        resource_version=resource_version,
        creation_timestamp=_LONG_AGO,
        deletion_timestamp=_LONG_AGO if deleting else None,
        annotations={k: v for k, v in (annotations or {}).items() if v is not None},
        finalizers=finalizers,
    )


def _reference(made_for: PersistentVolumeClaim | None) -> ObjectReference | None:
    if made_for is None:
        return None
    return ObjectReference(
        kind=made_for.KIND,
        api_version=made_for.API_VERSION,
        namespace=made_for.namespace,
        name=made_for.name,
        uid=made_for.uid,
        resource_version=made_for.metadata.resource_version,
    )


def claim(
    *,
    name: str = "data",
    namespace: str = "default",
    uid: str | None = None,
    resource_version: str = "1",
    provisioner: str | None = PROVISIONER,
    class_name: str | None = "standard",
    storage: str = "1Gi",
    access_modes: tuple[str, ...] = ("ReadWriteOnce",),
    volume_mode: str | None = "Filesystem",
    volume_name: str = "",
    selected_node: str | None = None,
    deleting: bool = False,
    annotations: Mapping[str, str] | None = None,
    selector: LabelSelector | None = None,
    data_source: TypedReference | None = None,
    data_source_ref: TypedReference | None = None,
    attributes_class: str | None = None,
) -> PersistentVolumeClaim:
    """A claim that waits for a volume.

    Args:
        uid: made from namespace and name by default: the same for the same claim.
        provisioner: whom the controller manager has asked to serve it; None: nobody yet.
        deleting: whether it has been deleted and waits for its finalizers.
        annotations: more annotations; they win over those of the other arguments.
    """
    notes = {ANN_STORAGE_PROVISIONER: provisioner, ANN_SELECTED_NODE: selected_node}
    return PersistentVolumeClaim(
        metadata=_metadata(
            name,
            uid=uid or _uid("claim", namespace, name),
            resource_version=resource_version,
            namespace=namespace,
            deleting=deleting,
            annotations=notes | dict(annotations or {}),
        ),
        spec=ClaimSpec(
            access_modes=access_modes,
            resources=Resources(requests={"storage": storage}),
            storage_class_name=class_name,
            volume_mode=volume_mode,
            volume_name=volume_name,
            selector=selector,
            data_source=data_source,
            data_source_ref=data_source_ref,
            volume_attributes_class_name=attributes_class,
        ),
    )


_DEFAULT_CLAIM = claim()


def volume(
    *,
    name: str | None = None,
    uid: str | None = None,
    resource_version: str = "1",
    provisioner: str | None = PROVISIONER,
    made_for: PersistentVolumeClaim | None = _DEFAULT_CLAIM,
    class_name: str = "standard",
    capacity: str = "1Gi",
    phase: str = "Bound",
    reclaim_policy: str = "Delete",
    finalizers: tuple[str, ...] = (FINALIZER,),
    deleting: bool = False,
    annotations: Mapping[str, str] | None = None,
    source: NFSVolumeSource | None = None,
) -> PersistentVolume:
    """A volume that is bound to a claim.

    Args:
        name: ``pvc-`` and the UID of its claim by default.
        uid: made from the name by default: the same for the same volume.
        provisioner: who made it; None: nobody, it is a static one.
        made_for: the claim in its ``claimRef``; None: it has none.
        phase: ``Available``, ``Bound``, ``Released`` or ``Failed``.
        deleting: whether it has been deleted and waits for its finalizers.
        annotations: more annotations; they win over those of the other arguments.
        source: where the data is; an NFS export by default.
    """
    if name is None:
        name = f"pvc-{made_for.uid}" if made_for is not None else "volume"
    return PersistentVolume(
        metadata=_metadata(
            name,
            uid=uid or _uid("volume", name),
            resource_version=resource_version,
            deleting=deleting,
            annotations={ANN_PROVISIONED_BY: provisioner, **(annotations or {})},
            finalizers=finalizers,
        ),
        spec=VolumeSpec(
            access_modes=("ReadWriteOnce",),
            capacity={"storage": capacity},
            claim_ref=_reference(made_for),
            persistent_volume_reclaim_policy=reclaim_policy,
            storage_class_name=class_name,
            volume_mode="Filesystem",
            nfs=source or NFSVolumeSource(server="nfs.example", path=f"/export/{name}"),
        ),
        status=VolumeStatus(phase=phase),
    )


def storage_class(
    *,
    name: str = "standard",
    uid: str | None = None,
    resource_version: str = "1",
    provisioner: str = PROVISIONER,
    parameters: Mapping[str, str] | None = None,
    reclaim_policy: str = "Delete",
    binding_mode: str = "Immediate",
    mount_options: tuple[str, ...] = (),
    allow_expansion: bool | None = None,
) -> StorageClass:
    """A class of the provisioner, without parameters.

    Args:
        uid: made from the name by default: the same for the same class.
        binding_mode: ``Immediate`` or ``WaitForFirstConsumer``.
    """
    return StorageClass(
        metadata=_metadata(name, uid=uid or _uid("class", name), resource_version=resource_version),
        provisioner=provisioner,
        parameters=dict(parameters or {}),
        reclaim_policy=reclaim_policy,
        volume_binding_mode=binding_mode,
        mount_options=mount_options,
        allow_volume_expansion=allow_expansion,
    )
