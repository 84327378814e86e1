"""From a claim and its class to what is asked of ``provision``, or to why it cannot be asked.

What is read for it comes from the API server and not from a cache: a clone of the wrong volume or a
volume for a node that is gone costs more than a request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from external_storage import volume_name
from external_storage.claims import Abilities, selected_node, source_claim, why_refused
from external_storage.deadline import NEVER
from external_storage.errors import Infeasible, ProvisioningFailed, Reschedule
from external_storage.events import EventRecorder
from external_storage.fields import Problems
from external_storage.intents import Intent
from external_storage.kube import quantity
from external_storage.kube.client import Client
from external_storage.kube.errors import Forbidden
from external_storage.kube.names import BINDING_WAIT, PHASE_BOUND
from external_storage.kube.types import (
    Node,
    PersistentVolume,
    PersistentVolumeClaim,
    StorageClass,
    VolumeAttributesClass,
)
from external_storage.logs import get_logger
from external_storage.parameters import Parameters
from external_storage.persistent_volume import is_ours
from external_storage.provisioner import Provisioner, ProvisionRequest
from external_storage.settings import Settings

log = get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class RequestBuilder:
    """Builds requests for one provisioner; a request gets its deadline when it is made."""

    provisioner: Provisioner[Any, Any]
    settings: Settings
    client: Client
    events: EventRecorder
    _may_read_nodes: bool = field(default=True, init=False)

    def build(
        self, claim: PersistentVolumeClaim, storage_class: StorageClass
    ) -> ProvisionRequest[Parameters]:
        """The request for a claim.

        Raises:
            Infeasible: not as long as the claim and its class are what they are.
            ProvisioningFailed: not now.
            Reschedule: the selected node is gone.
            KubeError: what has to be read cannot be.
        """
        refusal = why_refused(claim, self._abilities())
        if refusal is not None:
            raise Infeasible(refusal)
        parameters = self._parameters(claim, storage_class)
        name = self._name(claim)
        node = selected_node(claim)
        if node is not None and storage_class.volume_binding_mode == BINDING_WAIT:
            self._look_at_node(node)
        capacity = quantity.to_bytes(claim.spec.resources.requests.get("storage", "0"))
        return ProvisionRequest(
            volume_name=name,
            claim=claim,
            storage_class=storage_class,
            parameters=parameters,
            capacity=capacity,
            selected_node=node,
            deadline=NEVER,
            source_volume=self._source(claim, capacity),
            volume_attributes=self._attributes(claim),
        )

    def again(self, claim: PersistentVolumeClaim, intent: Intent) -> ProvisionRequest[Parameters]:
        """The request that an intent was written for, whatever has changed since."""
        return ProvisionRequest(
            volume_name=intent.volume_name,
            claim=claim,
            storage_class=intent.storage_class,
            parameters=self._parameters(claim, intent.storage_class),
            capacity=intent.capacity,
            selected_node=intent.node,
            deadline=NEVER,
            source_volume=intent.source_volume,
            volume_attributes=intent.volume_attributes,
        )

    def _abilities(self) -> Abilities:
        return Abilities(
            supports_block=self.provisioner.supports_block,
            supports_clone=self.provisioner.supports_clone,
            supports_volume_attributes=self.provisioner.supports_volume_attributes,
            access_modes=self.provisioner.access_modes,
        )

    def _parameters(self, claim: PersistentVolumeClaim, storage_class: StorageClass) -> Parameters:
        kind = self.provisioner.parameters_type
        given = storage_class.parameters
        unknown = kind.unknown_keys(given) if self.settings.lenient_parameters else []
        try:
            parameters = kind.from_class({k: v for k, v in given.items() if k not in unknown})
        except Problems as error:
            raise Infeasible(f"class {storage_class.name!r}: {error}") from error
        if unknown:
            keys = ", ".join(repr(key) for key in unknown)
            text = f"class {storage_class.name!r}: unknown parameters have no effect: {keys}"
            self.events.warning(claim, "UnknownParameters", text)
        return parameters

    def _name(self, claim: PersistentVolumeClaim) -> str:
        try:
            return volume_name.render(
                self.settings.volume_name_template,
                namespace=claim.namespace,
                name=claim.name,
                uid=claim.uid,
            )
        except volume_name.BadVolumeName as error:
            raise Infeasible(str(error)) from error

    def _look_at_node(self, name: str) -> None:
        if not self._may_read_nodes:
            return
        try:
            node = self.client.find(Node, name)
        except Forbidden as error:
            # Told once: without the right, a node that is gone is the author's to find out.
            self._may_read_nodes = False
            log.warning("nodes cannot be read", error=str(error))
            return
        if node is None:
            raise Reschedule(f"the selected node {name} does not exist any more")

    def _source(self, claim: PersistentVolumeClaim, capacity: int) -> PersistentVolume | None:
        """The volume to be cloned."""
        name = source_claim(claim)
        if name is None:
            return None
        source = self.client.find(PersistentVolumeClaim, name, namespace=claim.namespace)
        if source is None:
            raise ProvisioningFailed(f"the source claim {name} does not exist")
        if source.status.phase != PHASE_BOUND or not source.spec.volume_name:
            raise ProvisioningFailed(f"the source claim {name} is not Bound")
        if source.metadata.deletion_timestamp is not None:
            raise ProvisioningFailed(f"the source claim {name} is being deleted")
        volume = self._source_volume(source)
        size = quantity.to_bytes(volume.spec.capacity.get("storage", "0"))
        if capacity < size:
            raise Infeasible(
                f"the claim asks for {quantity.from_bytes(capacity)}, its source {name} has "
                f"{quantity.from_bytes(size)}: a clone cannot be smaller"
            )
        if (claim.spec.volume_mode or "Filesystem") != (volume.spec.volume_mode or "Filesystem"):
            raise Infeasible(f"volumeMode is not that of the source claim {name}")
        return volume

    def _source_volume(self, source: PersistentVolumeClaim) -> PersistentVolume:
        name = source.spec.volume_name
        volume = self.client.find(PersistentVolume, name)
        if volume is None:
            raise ProvisioningFailed(f"volume {name} of the source claim does not exist")
        reference = volume.spec.claim_ref
        if reference is None or reference.uid != source.uid:
            raise ProvisioningFailed(f"volume {name} is not bound to the source claim")
        if not is_ours(volume, self.settings.names):
            raise Infeasible(f"volume {name} of the source claim is another provisioner's")
        return volume

    def _attributes(self, claim: PersistentVolumeClaim) -> VolumeAttributesClass | None:
        name = claim.spec.volume_attributes_class_name
        if not name:
            return None
        found = self.client.find(VolumeAttributesClass, name)
        if found is None:
            raise ProvisioningFailed(f"VolumeAttributesClass {name} does not exist")
        if found.driver_name not in self.settings.names:
            raise Infeasible(f"VolumeAttributesClass {name} is for driver {found.driver_name}")
        return found
