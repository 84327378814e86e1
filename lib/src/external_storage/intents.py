"""Durable intents: a finalizer on the claim, from before the first call until the volume is saved.

For back ends beside which no asset record can be written. What was begun must be found again after
a restart, also when the claim was deleted or its class changed meanwhile: so all that the call was
made with is written down too, and the same call is made again until it ends.

Whoever makes a claim can write its annotations. The note is signed, with a key in a Secret that is
ours alone and for this one claim: what a user has written there is never acted on.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import threading
from typing import Any

import msgspec

from external_storage.claims import has_intent, is_terminating
from external_storage.kube.client import Client
from external_storage.kube.decoding import decoder
from external_storage.kube.errors import AlreadyExists, Conflict, Invalid, NotFound
from external_storage.kube.names import ANN_INTENT, INTENT_FINALIZER
from external_storage.kube.request import STRATEGIC_PATCH
from external_storage.kube.types import (
    KubeStruct,
    PersistentVolume,
    PersistentVolumeClaim,
    Secret,
    StorageClass,
    VolumeAttributesClass,
)
from external_storage.logs import get_logger
from external_storage.provisioner import ProvisionRequest

log = get_logger(__name__)

KEY_SECRET = "external-storage-intents"
_KEY_BYTES = 32


class Intent(KubeStruct, frozen=True):
    """What a provisioning was begun with."""

    volume_name: str
    capacity: int
    storage_class: StorageClass
    owner: str = ""
    """Which instance has begun it, where only that one can go on."""
    node: str | None = None
    source_volume: PersistentVolume | None = None
    volume_attributes: VolumeAttributesClass | None = None


decoder(Intent)


class ClaimGone(Exception):
    """The claim is gone or going: nothing must be begun for it."""


class Intents:
    """Reads and writes the intents of one provisioner. Safe to use from several threads."""

    def __init__(self, client: Client, *, namespace: str) -> None:
        """``namespace``: where the Secret with the key is, made when it is first needed."""
        self._client = client
        self._namespace = namespace
        self._lock = threading.Lock()
        self._key: bytes | None = None

    def read(self, claim: PersistentVolumeClaim) -> Intent | None:
        """What was begun for the claim; None without a note that is ours for this claim.

        Raises:
            KubeError: the key cannot be read.
        """
        signature, _, text = claim.metadata.annotations.get(ANN_INTENT, "").partition(" ")
        if not has_intent(claim) or not text:
            return None
        if not hmac.compare_digest(signature.encode(), self._sign(claim, text).encode()):
            log.warning("the note of an intent is not ours", claim=claim.key)
            return None
        try:
            intent: Intent = decoder(Intent).decode(text)
        except msgspec.DecodeError as error:
            log.error("the note of an intent cannot be read", claim=claim.key, error=str(error))
            return None
        return intent

    def begin(self, request: ProvisionRequest[Any], *, owner: str) -> PersistentVolumeClaim:
        """Write down that the volume of ``request`` is about to be made; the claim as it is then.

        Raises:
            ClaimGone: it is too late to begin.
            KubeError: nothing must be begun yet.
        """
        claim = request.claim
        intent = Intent(
            volume_name=request.volume_name,
            capacity=request.capacity,
            storage_class=_essence(request.storage_class),
            owner=owner,
            node=request.selected_node,
            source_volume=request.source_volume,
            volume_attributes=request.volume_attributes,
        )
        text = msgspec.json.encode(intent).decode()
        note = f"{self._sign(claim, text)} {text}"
        if has_intent(claim) and claim.metadata.annotations.get(ANN_INTENT) == note:
            return claim
        metadata = {"annotations": {ANN_INTENT: note}, "finalizers": [INTENT_FINALIZER]}
        try:
            return self._patch(claim, metadata)
        except (NotFound, Conflict, Invalid) as error:
            # 422: no finalizer may be added to an object that is being deleted.
            live = self._client.live(claim)
            if live is None or is_terminating(live):
                raise ClaimGone(str(error)) from error
            raise

    def end(self, claim: PersistentVolumeClaim) -> None:
        """Let go of the claim; one that is gone already is a success."""
        metadata: dict[str, Any] = {
            "annotations": {ANN_INTENT: None},
            "$deleteFromPrimitiveList/finalizers": [INTENT_FINALIZER],
        }
        try:
            self._patch(claim, metadata)
        except (NotFound, Conflict):
            if self._client.live(claim) is not None:
                raise

    def _patch(
        self, claim: PersistentVolumeClaim, metadata: dict[str, Any]
    ) -> PersistentVolumeClaim:
        return self._client.patch(
            PersistentVolumeClaim,
            claim.name,
            {"metadata": {"uid": claim.uid, **metadata}},
            namespace=claim.namespace,
            content_type=STRATEGIC_PATCH,
        )

    # -- the key

    def _sign(self, claim: PersistentVolumeClaim, text: str) -> str:
        content = f"{claim.uid}\n{text}".encode()
        return hmac.new(self._get_key(), content, hashlib.sha256).hexdigest()

    def _get_key(self) -> bytes:
        with self._lock:
            if self._key is None:
                self._key = self._read_key() or self._make_key()
            return self._key

    def _read_key(self) -> bytes | None:
        secret = self._client.find(Secret, KEY_SECRET, namespace=self._namespace)
        if secret is None:
            return None
        try:
            key = base64.b64decode(secret.data.get("key", ""), validate=True)
        except binascii.Error:
            key = b""
        if len(key) < _KEY_BYTES:
            raise ValueError(f"Secret {self._namespace}/{KEY_SECRET} holds no key of ours")
        return key

    def _make_key(self) -> bytes:
        key = secrets.token_bytes(_KEY_BYTES)
        fields = {
            "metadata": {"name": KEY_SECRET, "namespace": self._namespace},
            "data": {"key": base64.b64encode(key).decode()},
        }
        try:
            self._client.create(Secret, fields, namespace=self._namespace)
        except AlreadyExists:
            return self._read_key() or self._make_key()
        return key


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
