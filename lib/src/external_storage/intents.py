"""Durable intents: a finalizer on the claim, from before the first call until the volume is saved.

For back ends beside which no asset record can be written. What was begun must be found again after
a restart, also when the claim was deleted or its class changed meanwhile: so the class and the node
that it was begun with are written down too, and the same call is made again until it ends.
"""

from __future__ import annotations

from typing import Any

import msgspec

from external_storage.claims import has_intent, selected_node
from external_storage.kube.client import Client
from external_storage.kube.decoding import decoder
from external_storage.kube.errors import Conflict, Invalid, NotFound
from external_storage.kube.names import ANN_INTENT, INTENT_FINALIZER
from external_storage.kube.request import STRATEGIC_PATCH
from external_storage.kube.types import KubeStruct, PersistentVolumeClaim, StorageClass
from external_storage.logs import get_logger

log = get_logger(__name__)


class Intent(KubeStruct, frozen=True):
    """What a provisioning was begun with."""

    storage_class: StorageClass
    node: str | None = None


class ClaimGone(Exception):
    """The claim is gone or going: nothing must be begun for it."""


def read_intent(claim: PersistentVolumeClaim) -> Intent | None:
    """What was begun for the claim, if anything; None also for a note that cannot be read."""
    note = claim.metadata.annotations.get(ANN_INTENT)
    if not has_intent(claim) or note is None:
        return None
    try:
        intent: Intent = decoder(Intent).decode(note)
    except msgspec.DecodeError as error:
        log.error("the note of an intent cannot be read", claim=claim.key, error=str(error))
        return None
    return intent


def begin_intent(
    client: Client, claim: PersistentVolumeClaim, storage_class: StorageClass
) -> PersistentVolumeClaim:
    """Write down that the claim's volume is about to be made; the claim as it is then.

    Raises:
        ClaimGone: it is too late to begin.
        KubeError: nothing must be begun yet.
    """
    note = msgspec.json.encode(Intent(_essence(storage_class), selected_node(claim))).decode()
    if has_intent(claim) and claim.metadata.annotations.get(ANN_INTENT) == note:
        return claim
    patch = {
        "metadata": {
            "uid": claim.uid,
            "annotations": {ANN_INTENT: note},
            "finalizers": [INTENT_FINALIZER],
        }
    }
    try:
        return _patch(client, claim, patch)
    except (NotFound, Conflict, Invalid) as error:
        # 422: no finalizer may be added to an object that is being deleted.
        raise ClaimGone(str(error)) from error


def end_intent(client: Client, claim: PersistentVolumeClaim) -> None:
    """Let go of the claim; one that is gone already is a success."""
    patch: dict[str, Any] = {
        "metadata": {
            "uid": claim.uid,
            "annotations": {ANN_INTENT: None},
            "$deleteFromPrimitiveList/finalizers": [INTENT_FINALIZER],
        }
    }
    try:
        _patch(client, claim, patch)
    except (NotFound, Conflict):
        return


def _patch(client: Client, claim: PersistentVolumeClaim, patch: object) -> PersistentVolumeClaim:
    return client.patch(
        PersistentVolumeClaim,
        claim.name,
        patch,
        namespace=claim.namespace,
        content_type=STRATEGIC_PATCH,
    )


def _essence(storage_class: StorageClass) -> StorageClass:
    """The class without what has no influence on its volumes."""
    meta = storage_class.metadata
    return msgspec.structs.replace(
        storage_class,
        metadata=msgspec.structs.replace(
            meta,
            labels={},
            annotations={},
            finalizers=(),
            owner_references=(),
            resource_version="",
            creation_timestamp=None,
        ),
    )
