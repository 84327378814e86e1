"""Saving a volume so that nothing made in the backend is ever lost sight of.

Between the author's success and the saved PersistentVolume lies the one gap in which an asset could
leak. The fields of a volume that could not be saved are kept and saved again, also when the claim
is gone by then: the controller manager marks such a volume Released, and it is deleted in the usual
way. It is undone only when the API server has said that it can never be saved.

The store also remembers what it wrote until the informers show it, so that a lagging watch never
makes us provision twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from external_storage.errors import Ignored, Infeasible
from external_storage.kube.client import Client
from external_storage.kube.errors import (
    AlreadyExists,
    BadRequest,
    Invalid,
    KubeError,
    NotFound,
    StatusError,
)
from external_storage.kube.names import ANN_PROVISIONED_BY
from external_storage.kube.types import PersistentVolume, PersistentVolumeClaim
from external_storage.logs import get_logger
from external_storage.persistent_volume import as_volume, is_same_asset

log = get_logger(__name__)


class SaveFailed(Exception):
    """The volume is not saved yet; its fields are kept for another try."""


class VolumeStore:
    """Saves volumes, checks conflicts, remembers. Safe for different claims from many threads."""

    def __init__(
        self,
        client: Client,
        *,
        undo: Callable[[PersistentVolume], None],
        on_saved: Callable[[str], None],
        is_elsewhere: Callable[[PersistentVolume], bool] = lambda _: False,
    ) -> None:
        """
        Args:
            undo: removes the asset of a volume.
            on_saved: is told the name of a saved one.
            is_elsewhere: whether the asset of a saved volume is one that another instance has, and
                not what we have made.
        """
        self._client = client
        self._undo = undo
        self._on_saved = on_saved
        self._is_elsewhere = is_elsewhere
        self._lock = threading.Lock()
        self._unsaved: dict[str, dict[str, Any]] = {}
        self._saved: dict[str, str] = {}
        self._doubtful: set[str] = set()

    # -- saving

    def save(self, claim_uid: str, fields: dict[str, Any]) -> PersistentVolume:
        """Save the volume of a claim, or adopt it if an earlier try of ours did arrive.

        Raises:
            SaveFailed: not now; the fields are kept.
            Infeasible: never; the asset has been undone.
        """
        with self._lock:
            self._unsaved[claim_uid] = fields
        try:
            volume = self._client.create(PersistentVolume, fields)
        except AlreadyExists as error:
            volume = self._adopt(claim_uid, fields, error)
        except (Invalid, BadRequest) as error:
            # An admission plugin may refuse even a volume that an earlier try of ours has saved.
            volume = self._adopt(claim_uid, fields, error)
        except KubeError as error:
            raise SaveFailed(f"saving volume {fields['metadata']['name']}: {error}") from error
        with self._lock:
            self._unsaved.pop(claim_uid, None)
            self._doubtful.discard(claim_uid)
            self._saved[claim_uid] = volume.name
        try:
            self._on_saved(volume.name)
        except Exception:
            # The volume is saved whatever becomes of its record; the next start publishes it.
            log.exception("an asset record cannot be published", volume=volume.name)
        return volume

    def save_again(self, claim_uid: str) -> PersistentVolume:
        """Try once more to save the volume of an earlier ``save`` that failed."""
        return self.save(claim_uid, self._unsaved[claim_uid])

    def discard(self, fields: dict[str, Any]) -> None:
        """Undo an asset whose volume we ourselves refuse to save; a failure is only logged, for
        the next try of the claim makes or finds the asset again."""
        try:
            self._undo(as_volume(fields))
        except Exception:
            log.exception("undoing an unfit volume failed", volume=fields["metadata"]["name"])

    def has_unsaved(self, claim_uid: str) -> bool:
        return claim_uid in self._unsaved

    def unsaved_count(self) -> int:
        return len(self._unsaved)

    # -- remembering

    def was_saved(self, claim_uid: str) -> bool:
        """Whether the claim has its volume already, though its cached state may not show it."""
        return claim_uid in self._saved and claim_uid not in self._doubtful

    def claim_seen(self, claim_uid: str, claim: PersistentVolumeClaim | None) -> None:
        """The informer shows the claim (None: deleted): forget what can be read from it now."""
        if claim is None or claim.spec.volume_name:
            with self._lock:
                self._saved.pop(claim_uid, None)
                self._doubtful.discard(claim_uid)

    def volume_gone(self, volume: PersistentVolume) -> None:
        """The informer shows that a volume is deleted: its claim may need another one."""
        claim_uid = volume.spec.claim_ref.uid if volume.spec.claim_ref else ""
        with self._lock:
            if self._saved.get(claim_uid) == volume.name:
                self._doubtful.add(claim_uid)

    def still_wants_volume(self, claim: PersistentVolumeClaim) -> bool:
        """Ask the API server, if the cached claim cannot be trusted because its volume came and
        went; raises ``KubeError``."""
        if claim.uid not in self._doubtful:
            return True
        try:
            live = self._client.get(PersistentVolumeClaim, claim.name, namespace=claim.namespace)
        except NotFound:
            return False
        return (
            live.uid == claim.uid
            and not live.spec.volume_name
            and live.metadata.deletion_timestamp is None
        )

    # -- inside

    def _adopt(
        self, claim_uid: str, fields: dict[str, Any], refusal: StatusError
    ) -> PersistentVolume:
        """The volume of that name, if it is the one we meant to save; none there: undo, if the
        refusal was for good."""
        name = fields["metadata"]["name"]
        try:
            existing = self._client.get(PersistentVolume, name)
        except NotFound:
            if isinstance(refusal, AlreadyExists):
                raise SaveFailed(f"volume {name} has just been deleted") from refusal
            self._undo_unsaved(claim_uid, fields)
            raise Infeasible(f"the volume cannot be saved: {refusal}") from refusal
        except KubeError as error:
            raise SaveFailed(f"volume {name} cannot be read after {refusal}: {error}") from error
        reference = existing.spec.claim_ref
        ours = fields["metadata"]["annotations"][ANN_PROVISIONED_BY]
        if existing.metadata.deletion_timestamp is not None:
            raise SaveFailed(f"volume {name} of an earlier try is still being deleted")
        if reference is None or reference.uid != claim_uid:
            raise SaveFailed(f"volume {name} exists already and belongs to another claim")
        if existing.metadata.annotations.get(ANN_PROVISIONED_BY) != ours:
            raise SaveFailed(f"volume {name} exists already and is another provisioner's")
        if self._is_elsewhere(existing):
            # Another instance was faster: the claim has its volume, ours is one too many.
            self._undo_unsaved(claim_uid, fields)
            raise Ignored(f"volume {name} has been made by another instance")
        if not is_same_asset(fields, existing):
            # Names are unique, so it is the same asset, told differently: never to be undone.
            log.warning("a volume differs from what was to be saved; it is kept", volume=name)
        return existing

    def _undo_unsaved(self, claim_uid: str, fields: dict[str, Any]) -> None:
        name = fields["metadata"]["name"]
        try:
            self._undo(as_volume(fields))
        except Exception as error:
            log.exception("undoing a volume that cannot be saved failed", volume=name)
            raise SaveFailed(f"volume {name} cannot be saved nor undone: {error}") from error
        with self._lock:
            self._unsaved.pop(claim_uid, None)
