"""The PersistentVolume of a candidate: created, adopted, grown, deleted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from external_storage import PersistentVolume, StorageClass, get_logger
from external_storage.kube import quantity
from external_storage.kube.client import Client
from external_storage.kube.errors import AlreadyExists, Conflict, NotFound
from external_storage.kube.names import ANN_PROVISIONED_BY, LABEL_HOSTNAME
from local_volume_provisioner import identity, names
from local_volume_provisioner.config import Config, NameFormat, VolumeMode
from local_volume_provisioner.identity import Identity
from local_volume_provisioner.node import NodeFacts
from local_volume_provisioner.scan import Candidate, Kind

log = get_logger(__name__)


class NameTaken(Exception):
    """Volumes that are not ours have both names that this one could have."""


@dataclass(frozen=True, slots=True)
class Made:
    """A volume that is there now."""

    volume: PersistentVolume
    is_new: bool
    """False: it was there already, and may have been used."""


class VolumeApi:
    """Writes volumes of one node."""

    def __init__(self, client: Client, node: NodeFacts, config: Config) -> None:
        self._client = client
        self._node = node
        self._config = config

    @property
    def cluster(self) -> str:
        return self._node.cluster

    def create(self, candidate: Candidate, storage_class: StorageClass) -> Made:
        """A volume for it; one of ours that is there already is taken over.

        Raises NameTaken, KubeError.
        """
        fields = self._fields(candidate, storage_class)
        for name in self._names(candidate):
            fields["metadata"]["name"] = name
            try:
                return Made(self._client.create(PersistentVolume, fields), is_new=True)
            except AlreadyExists:
                found = self._client.find(PersistentVolume, name)
                if found is not None and found.metadata.deletion_timestamp is not None:
                    raise NameTaken(f"the volume {name} is still being deleted") from None
                if found is not None and self._is_of(found, candidate):
                    return Made(self.adopt(found), is_new=False)
            log.warning("the name of a volume is taken by another one", volume=name)
        raise NameTaken(f"the name {name} is another volume's")

    def adopt(self, volume: PersistentVolume) -> PersistentVolume:
        """Put our label on it, so that we watch it."""
        patch = {
            "metadata": {
                "uid": volume.uid,
                "labels": {names.LABEL_NODE: names.node_label(self._node.name)},
            }
        }
        return self._client.patch(PersistentVolume, volume.name, patch)

    def is_adoptable(self, volume: PersistentVolume) -> bool:
        """Made for this node by the reference, or by us, and without our label."""
        by = volume.metadata.annotations.get(ANN_PROVISIONED_BY, "")
        return (
            volume.spec.local is not None
            and names.LABEL_NODE not in volume.metadata.labels
            and names.is_provisioned_here(by, self._node.name)
            and self.is_here(volume)
        )

    def is_here(self, volume: PersistentVolume) -> bool:
        """Whether its pods come to this node."""
        return self._node.hostname in _hostnames(volume)

    def note_identity(self, volume: PersistentVolume, found: Identity) -> None:
        patch = {
            "metadata": {
                "uid": volume.uid,
                "annotations": {names.ANN_IDENTITY: identity.encode(found)},
            }
        }
        self._client.patch(PersistentVolume, volume.name, patch)

    def grow(self, volume: PersistentVolume, size: int) -> None:
        """Only as it was when it was found free: Conflict if a claim has come meanwhile."""
        patch = {
            "metadata": {
                "uid": volume.uid,
                "resourceVersion": volume.metadata.resource_version,
            },
            "spec": {"capacity": {"storage": quantity.from_bytes(size)}},
        }
        self._client.patch(PersistentVolume, volume.name, patch)

    def withdraw(self, volume: PersistentVolume) -> None:
        """Delete a volume that nobody has: Conflict if a claim has come meanwhile."""
        version = volume.metadata.resource_version
        self._client.delete(PersistentVolume, volume.name, uid=volume.uid, resource_version=version)

    def _names(self, candidate: Candidate) -> list[str]:
        parts = (candidate.entry, self._node.name, candidate.class_config.name)
        safe = names.safe_name(*parts)
        if self._config.name_format is NameFormat.SAFE:
            return [safe]
        return [names.compatible_name(*parts), safe]

    def _is_of(self, volume: PersistentVolume, candidate: Candidate) -> bool:
        by = volume.metadata.annotations.get(ANN_PROVISIONED_BY, "")
        return (
            volume.spec.local is not None
            and volume.spec.local.path == candidate.path
            and volume.spec.storage_class_name == candidate.class_config.name
            and names.is_provisioned_here(by, self._node.name)
        )

    def _fields(self, candidate: Candidate, storage_class: StorageClass) -> dict[str, Any]:
        node, config, kind = self._node, self._config, candidate.class_config
        by = names.provisioner_name(node.name, node.uid, name_only=config.use_node_name_only)
        copied = {key: node.labels[key] for key in config.node_labels if key in node.labels}
        label = {names.LABEL_NODE: names.node_label(node.name)}
        metadata: dict[str, Any] = {
            "labels": {**copied, **config.labels, **label},
            "annotations": {
                ANN_PROVISIONED_BY: by,
                names.ANN_IDENTITY: identity.encode(candidate.identity),
            },
        }
        if config.set_owner_reference:
            owner = {"apiVersion": "v1", "kind": "Node", "name": node.name, "uid": node.uid}
            metadata["ownerReferences"] = [owner]
        local = {"path": candidate.path}
        if kind.fs_type and candidate.kind is Kind.DEVICE and kind.mode is VolumeMode.FILESYSTEM:
            local["fsType"] = kind.fs_type
        spec: dict[str, Any] = {
            "capacity": {"storage": quantity.from_bytes(names.rounded(candidate.size))},
            "local": local,
            "accessModes": [kind.access_mode],
            "persistentVolumeReclaimPolicy": storage_class.reclaim_policy,
            "storageClassName": kind.name,
            "volumeMode": kind.mode.value,
            "nodeAffinity": {"required": {"nodeSelectorTerms": self._terms(candidate)}},
        }
        if kind.mode is VolumeMode.FILESYSTEM and storage_class.mount_options:
            spec["mountOptions"] = list(storage_class.mount_options)
        return {"metadata": metadata, "spec": spec}

    def _terms(self, candidate: Candidate) -> list[Any]:
        own = {"key": LABEL_HOSTNAME, "operator": "In", "values": [self._node.hostname]}
        return [{"matchExpressions": [own]}, *candidate.class_config.selector]


def delete(client: Client, volume: PersistentVolume) -> None:
    """As it was when it was looked at, for somebody may take it back into service; being gone is a
    success. Raises KubeError."""
    version = volume.metadata.resource_version
    try:
        client.delete(PersistentVolume, volume.name, uid=volume.uid, resource_version=version)
    except NotFound:
        return
    except Conflict:
        if client.live(volume) is not None:
            raise


def _hostnames(volume: PersistentVolume) -> set[str]:
    affinity = volume.spec.node_affinity
    if affinity is None or affinity.required is None:
        return set()
    return {
        value
        for term in affinity.required.node_selector_terms
        for wanted in term.match_expressions
        if wanted.key == LABEL_HOSTNAME and wanted.operator == "In"
        for value in wanted.values
    }


def identity_of(volume: PersistentVolume) -> Identity | None:
    """What its annotation says."""
    text = volume.metadata.annotations.get(names.ANN_IDENTITY)
    return identity.decode(text) if text else None
