"""The API objects as authors see them: typed, in snake_case, with only the fields we use.

They are for reading. An object read through these types has lost the fields that are not listed
here, so it is never written back whole: whoever changes an object sends a patch.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec


class KubeStruct(msgspec.Struct, rename="camel", omit_defaults=True, frozen=True):
    """Base of all API types: camelCase on the wire, unknown fields ignored, immutable."""


class OwnerReference(KubeStruct, frozen=True):
    api_version: str = ""
    kind: str = ""
    name: str = ""
    uid: str = ""
    controller: bool | None = None


class ObjectMeta(KubeStruct, frozen=True):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    finalizers: tuple[str, ...] = ()
    owner_references: tuple[OwnerReference, ...] = ()

    def is_older_than(self, version: str) -> bool:
        """Whether ``version``, of the same object, is a later one; False where nobody can tell."""
        try:
            return int(self.resource_version) < int(version)
        except ValueError:
            return False


class KubeObject(KubeStruct, frozen=True):
    """An object with metadata, and where its kind lives in the API."""

    API_VERSION: ClassVar[str] = ""
    KIND: ClassVar[str] = ""
    RESOURCE: ClassVar[str] = ""
    """The plural in the URL, also the word for RBAC and metrics."""
    NAMESPACED: ClassVar[bool] = False

    metadata: ObjectMeta = ObjectMeta()

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def namespace(self) -> str:
        return self.metadata.namespace

    @property
    def uid(self) -> str:
        return self.metadata.uid

    @property
    def key(self) -> str:
        """``namespace/name``, or ``name`` for a kind without namespaces: unique at one moment."""
        meta = self.metadata
        return f"{meta.namespace}/{meta.name}" if meta.namespace else meta.name


class ObjectReference(KubeStruct, frozen=True):
    kind: str = ""
    api_version: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""
    resource_version: str = ""


class LabelSelector(KubeStruct, frozen=True):
    match_labels: dict[str, str] = {}
    match_expressions: tuple[dict[str, Any], ...] = ()


class TypedReference(KubeStruct, frozen=True):
    """``dataSource`` and ``dataSourceRef`` of a claim."""

    api_group: str | None = None
    kind: str = ""
    name: str = ""
    namespace: str | None = None


class Resources(KubeStruct, frozen=True):
    requests: dict[str, str] = {}
    limits: dict[str, str] = {}


class ClaimCondition(KubeStruct, frozen=True):
    type: str = ""
    status: str = ""
    reason: str = ""
    message: str = ""
    last_transition_time: str | None = None


class ClaimSpec(KubeStruct, frozen=True):
    access_modes: tuple[str, ...] = ()
    resources: Resources = Resources()
    storage_class_name: str | None = None
    volume_mode: str | None = None
    volume_name: str = ""
    selector: LabelSelector | None = None
    data_source: TypedReference | None = None
    data_source_ref: TypedReference | None = None
    volume_attributes_class_name: str | None = None


class ClaimStatus(KubeStruct, frozen=True):
    phase: str = ""
    access_modes: tuple[str, ...] = ()
    capacity: dict[str, str] = {}
    conditions: tuple[ClaimCondition, ...] = ()
    allocated_resources: dict[str, str] = {}
    allocated_resource_statuses: dict[str, str] = {}


class PersistentVolumeClaim(KubeObject, frozen=True):
    """A claim: what a user asks for."""

    API_VERSION: ClassVar[str] = "v1"
    KIND: ClassVar[str] = "PersistentVolumeClaim"
    RESOURCE: ClassVar[str] = "persistentvolumeclaims"
    NAMESPACED: ClassVar[bool] = True

    spec: ClaimSpec = ClaimSpec()
    status: ClaimStatus = ClaimStatus()


class NFSVolumeSource(KubeStruct, frozen=True):
    server: str = ""
    path: str = ""
    read_only: bool = False


class HostPathVolumeSource(KubeStruct, frozen=True):
    path: str = ""
    type: str | None = None


class LocalVolumeSource(KubeStruct, frozen=True):
    path: str = ""
    fs_type: str | None = None


class ISCSIVolumeSource(KubeStruct, frozen=True):
    target_portal: str = ""
    portals: tuple[str, ...] = ()
    iqn: str = ""
    lun: int = 0
    iscsi_interface: str = ""
    fs_type: str = ""
    read_only: bool = False
    chap_auth_discovery: bool = False
    chap_auth_session: bool = False
    secret_ref: dict[str, str] = {}
    initiator_name: str | None = None


class CSIVolumeSource(KubeStruct, frozen=True):
    driver: str = ""
    volume_handle: str = ""
    read_only: bool = False
    fs_type: str = ""
    volume_attributes: dict[str, str] = {}


class NodeSelectorRequirement(KubeStruct, frozen=True):
    key: str = ""
    operator: str = ""
    """In, NotIn, Exists, DoesNotExist, Gt or Lt; the API has no default."""
    values: tuple[str, ...] = ()


class NodeSelectorTerm(KubeStruct, frozen=True):
    match_expressions: tuple[NodeSelectorRequirement, ...] = ()
    match_fields: tuple[NodeSelectorRequirement, ...] = ()


class NodeSelector(KubeStruct, frozen=True):
    node_selector_terms: tuple[NodeSelectorTerm, ...] = ()


class VolumeNodeAffinity(KubeStruct, frozen=True):
    required: NodeSelector | None = None


class VolumeSpec(KubeStruct, frozen=True):
    access_modes: tuple[str, ...] = ()
    capacity: dict[str, str] = {}
    claim_ref: ObjectReference | None = None
    mount_options: tuple[str, ...] = ()
    node_affinity: VolumeNodeAffinity | None = None
    persistent_volume_reclaim_policy: str = ""
    storage_class_name: str = ""
    volume_mode: str | None = None
    nfs: NFSVolumeSource | None = None
    host_path: HostPathVolumeSource | None = None
    local: LocalVolumeSource | None = None
    iscsi: ISCSIVolumeSource | None = None
    csi: CSIVolumeSource | None = None


class VolumeStatus(KubeStruct, frozen=True):
    phase: str = ""
    message: str = ""
    reason: str = ""


class PersistentVolume(KubeObject, frozen=True):
    """A volume: what a claim is bound to."""

    API_VERSION: ClassVar[str] = "v1"
    KIND: ClassVar[str] = "PersistentVolume"
    RESOURCE: ClassVar[str] = "persistentvolumes"

    spec: VolumeSpec = VolumeSpec()
    status: VolumeStatus = VolumeStatus()


class TopologySelectorLabelRequirement(KubeStruct, frozen=True):
    key: str = ""
    values: tuple[str, ...] = ()


class TopologySelectorTerm(KubeStruct, frozen=True):
    match_label_expressions: tuple[TopologySelectorLabelRequirement, ...] = ()


class StorageClass(KubeObject, frozen=True):
    """A class: which provisioner makes a claim's volume, and how."""

    API_VERSION: ClassVar[str] = "storage.k8s.io/v1"
    KIND: ClassVar[str] = "StorageClass"
    RESOURCE: ClassVar[str] = "storageclasses"

    provisioner: str = ""
    parameters: dict[str, str] = {}
    reclaim_policy: str = "Delete"
    volume_binding_mode: str = "Immediate"
    mount_options: tuple[str, ...] = ()
    allow_volume_expansion: bool | None = None
    allowed_topologies: tuple[TopologySelectorTerm, ...] = ()


class VolumeAttributesClass(KubeObject, frozen=True):
    """Properties of a volume that may change while it lives."""

    API_VERSION: ClassVar[str] = "storage.k8s.io/v1"
    KIND: ClassVar[str] = "VolumeAttributesClass"
    RESOURCE: ClassVar[str] = "volumeattributesclasses"

    driver_name: str = ""
    parameters: dict[str, str] = {}


class Secret(KubeObject, frozen=True):
    """A secret; ``data`` is base64."""

    API_VERSION: ClassVar[str] = "v1"
    KIND: ClassVar[str] = "Secret"
    RESOURCE: ClassVar[str] = "secrets"
    NAMESPACED: ClassVar[bool] = True

    data: dict[str, str] = {}


class Node(KubeObject, frozen=True):
    """A node; only its name and labels are read."""

    API_VERSION: ClassVar[str] = "v1"
    KIND: ClassVar[str] = "Node"
    RESOURCE: ClassVar[str] = "nodes"


class CSIDriverSpec(KubeStruct, frozen=True):
    storage_capacity: bool | None = None


class CSIDriver(KubeObject, frozen=True):
    """What a cluster says of the driver, or the provisioner, of its name."""

    API_VERSION: ClassVar[str] = "storage.k8s.io/v1"
    KIND: ClassVar[str] = "CSIDriver"
    RESOURCE: ClassVar[str] = "csidrivers"

    spec: CSIDriverSpec = CSIDriverSpec()


class CSIStorageCapacity(KubeObject, frozen=True):
    """What is left for volumes of one class on one set of nodes; the scheduler reads it."""

    API_VERSION: ClassVar[str] = "storage.k8s.io/v1"
    KIND: ClassVar[str] = "CSIStorageCapacity"
    RESOURCE: ClassVar[str] = "csistoragecapacities"
    NAMESPACED: ClassVar[bool] = True

    storage_class_name: str = ""
    node_topology: LabelSelector | None = None
    """None: no node reaches it."""
    capacity: str | None = None
    maximum_volume_size: str | None = None


class EventSource(KubeStruct, frozen=True):
    component: str = ""
    host: str = ""


class Event(KubeObject, frozen=True):
    """An event: what ``kubectl describe`` shows under an object (core/v1)."""

    API_VERSION: ClassVar[str] = "v1"
    KIND: ClassVar[str] = "Event"
    RESOURCE: ClassVar[str] = "events"
    NAMESPACED: ClassVar[bool] = True

    involved_object: ObjectReference = ObjectReference()
    type: str = ""
    reason: str = ""
    message: str = ""
    source: EventSource = EventSource()
    count: int = 0
    first_timestamp: str | None = None
    last_timestamp: str | None = None
    reporting_component: str = ""
    reporting_instance: str = ""


class ServicePort(KubeStruct, frozen=True):
    name: str = ""
    port: int = 0
    protocol: str = "TCP"


class ServiceSpec(KubeStruct, frozen=True):
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    type: str = ""
    ports: tuple[ServicePort, ...] = ()
    selector: dict[str, str] = {}


class Service(KubeObject, frozen=True):
    """A service: the stable address under which a provisioner's own server is reached."""

    API_VERSION: ClassVar[str] = "v1"
    KIND: ClassVar[str] = "Service"
    RESOURCE: ClassVar[str] = "services"
    NAMESPACED: ClassVar[bool] = True

    spec: ServiceSpec = ServiceSpec()


class LeaseSpec(KubeStruct, frozen=True):
    holder_identity: str = ""
    lease_duration_seconds: int = 0
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int = 0


class LeaseObject(KubeObject, frozen=True):
    """Who leads among replicas, and since when; ``external_storage.Lease`` is what holds one."""

    API_VERSION: ClassVar[str] = "coordination.k8s.io/v1"
    KIND: ClassVar[str] = "Lease"
    RESOURCE: ClassVar[str] = "leases"
    NAMESPACED: ClassVar[bool] = True

    spec: LeaseSpec = LeaseSpec()


class ListMeta(KubeStruct, frozen=True):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")
    remaining_item_count: int | None = None


def encode_new(kind: type[KubeObject], fields: dict[str, Any]) -> bytes:
    """The JSON body that creates an object of ``kind`` from plain camelCase ``fields``."""
    return msgspec.json.encode({"apiVersion": kind.API_VERSION, "kind": kind.KIND, **fields})
