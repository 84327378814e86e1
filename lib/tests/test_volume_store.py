"""Saving a volume: what each answer of the API server means."""

import contextlib
from typing import Any, cast

import pytest

from external_storage.errors import Ignored, Infeasible
from external_storage.kube.client import Client
from external_storage.kube.errors import (
    AlreadyExists,
    BadRequest,
    Forbidden,
    Invalid,
    KubeError,
    NotFound,
    ServerError,
    StatusError,
    Unavailable,
)
from external_storage.kube.names import ANN_PROVISIONED_BY
from external_storage.kube.types import KubeObject, PersistentVolume
from external_storage.persistent_volume import as_volume, claim_reference
from external_storage.testing.builders import PROVISIONER, claim, volume
from external_storage.volume_store import SaveFailed, VolumeStore

CLAIM = claim()
UID = CLAIM.uid
NAME = f"pvc-{UID}"
FIELDS: dict[str, Any] = {
    "metadata": {"name": NAME, "annotations": {ANN_PROVISIONED_BY: PROVISIONER}},
    "spec": {"claimRef": claim_reference(CLAIM), "nfs": {"server": "s", "path": "/p"}},
}
DOWN = Unavailable("connection refused")


def refusal(kind: type[StatusError], code: int) -> StatusError:
    return kind("no", code=code)


class Server:
    """Holds objects by name. ``answers`` are given, one each, to the next creates: an error; one
    in ``lost`` is given after the object was saved."""

    def __init__(self) -> None:
        self.objects: dict[str, KubeObject] = {}
        self.answers: list[KubeError] = []
        self.lost: list[KubeError] = []
        self.unreadable: KubeError | None = None
        self.reads = 0

    def create(self, _kind: object, fields: dict[str, Any], *, namespace: str = "") -> KubeObject:
        if self.answers:
            raise self.answers.pop(0)
        made = as_volume(fields)
        if made.name in self.objects:
            raise refusal(AlreadyExists, 409)
        self.objects[made.name] = made
        if self.lost:
            raise self.lost.pop(0)
        return made

    def get(self, _kind: object, name: str, *, namespace: str = "") -> KubeObject:
        self.reads += 1
        if self.unreadable is not None:
            raise self.unreadable
        if name not in self.objects:
            raise refusal(NotFound, 404)
        return self.objects[name]


class Backend:
    """Notes what is undone and what is published."""

    def __init__(self) -> None:
        self.undone: list[str] = []
        self.published: list[str] = []
        self.broken: Exception | None = None

    def undo(self, made: PersistentVolume) -> None:
        if self.broken is not None:
            raise self.broken
        self.undone.append(made.name)

    def publish(self, name: str) -> None:
        if self.broken is not None:
            raise self.broken
        self.published.append(name)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def store(server: Server, backend: Backend) -> VolumeStore:
    return VolumeStore(cast("Client", server), undo=backend.undo, on_saved=backend.publish)


# -- saving


def test_a_saved_volume_is_returned_published_and_remembered(
    store: VolumeStore, backend: Backend
) -> None:
    assert store.save(UID, FIELDS).name == NAME
    assert backend.published == [NAME]
    assert store.was_saved(UID)
    assert (store.has_unsaved(UID), store.unsaved_count()) == (False, 0)


@pytest.mark.parametrize("error", [DOWN, refusal(ServerError, 500), refusal(Forbidden, 403)])
def test_fields_that_could_not_be_saved_are_kept_and_saved_again(
    store: VolumeStore, server: Server, backend: Backend, error: KubeError
) -> None:
    server.answers = [error, error]
    with pytest.raises(SaveFailed, match=f"saving volume {NAME}: "):
        store.save(UID, FIELDS)
    with pytest.raises(SaveFailed, match=f"saving volume {NAME}: "):
        store.save_again(UID)
    assert (store.has_unsaved(UID), store.unsaved_count()) == (True, 1)
    assert not store.was_saved(UID)
    assert store.save_again(UID).name == NAME
    assert not store.has_unsaved(UID)
    assert (backend.undone, backend.published) == ([], [NAME])


def test_a_save_whose_answer_was_lost_is_adopted(
    store: VolumeStore, server: Server, backend: Backend
) -> None:
    server.lost = [DOWN]
    with pytest.raises(SaveFailed):
        store.save(UID, FIELDS)
    assert store.save_again(UID).name == NAME
    assert store.was_saved(UID)
    assert (backend.undone, backend.published) == ([], [NAME])


@pytest.mark.parametrize(
    ("existing", "why"),
    [
        (volume(deleting=True), "of an earlier try is still being deleted"),
        (volume(name=NAME, made_for=claim(uid="x")), "belongs to another claim"),
        (volume(name=NAME, made_for=None), "belongs to another claim"),
        (volume(provisioner="example.com/other"), "is another provisioner's"),
        (volume(provisioner=None), "is another provisioner's"),
    ],
)
def test_a_volume_of_that_name_which_is_not_ours_is_never_adopted(
    store: VolumeStore, server: Server, backend: Backend, existing: PersistentVolume, why: str
) -> None:
    server.objects[NAME] = existing
    with pytest.raises(SaveFailed, match=why):
        store.save(UID, FIELDS)
    assert store.has_unsaved(UID)
    assert (backend.undone, backend.published) == ([], [])
    del server.objects[NAME]
    assert store.save_again(UID).name == NAME


def test_a_conflict_that_cannot_be_looked_at_is_tried_again(
    store: VolumeStore, server: Server
) -> None:
    server.objects[NAME] = as_volume(FIELDS)
    server.unreadable = DOWN
    with pytest.raises(SaveFailed, match="cannot be read"):
        store.save(UID, FIELDS)
    server.unreadable = None
    assert store.save_again(UID).name == NAME


OTHERS: list[dict[str, Any]] = [
    {"nfs": {"server": "elsewhere", "path": "/p"}},
    {"hostPath": {"path": "/p"}},
]


@pytest.mark.parametrize("other", OTHERS)
def test_the_volume_of_a_faster_instance_is_left_and_our_asset_undone(
    server: Server, backend: Backend, other: dict[str, Any]
) -> None:
    store = VolumeStore(
        cast("Client", server),
        undo=backend.undo,
        on_saved=backend.publish,
        is_elsewhere=lambda volume: volume == theirs,
    )
    theirs = as_volume({**FIELDS, "spec": {"claimRef": claim_reference(CLAIM), **other}})
    server.objects[NAME] = theirs
    with pytest.raises(Ignored, match="another instance"):
        store.save(UID, FIELDS)
    assert backend.undone == [NAME]
    assert not store.has_unsaved(UID)
    assert server.objects[NAME] == theirs


@pytest.mark.parametrize("other", OTHERS)
def test_a_saved_volume_that_looks_different_is_kept_and_nothing_is_undone(
    store: VolumeStore, server: Server, backend: Backend, other: dict[str, Any]
) -> None:
    """Its name is ours alone, and so is its asset: to undo it would remove the user's data."""
    theirs = as_volume({**FIELDS, "spec": {"claimRef": claim_reference(CLAIM), **other}})
    server.objects[NAME] = theirs
    assert store.save(UID, FIELDS) == theirs
    assert backend.undone == []


@pytest.mark.parametrize("error", [refusal(Invalid, 422), refusal(BadRequest, 400)])
def test_a_volume_that_can_never_be_saved_is_undone(
    store: VolumeStore, server: Server, backend: Backend, error: KubeError
) -> None:
    server.answers = [error]
    with pytest.raises(Infeasible, match="the volume cannot be saved"):
        store.save(UID, FIELDS)
    assert backend.undone == [NAME]
    assert (store.has_unsaved(UID), store.was_saved(UID)) == (False, False)


def test_an_undo_that_fails_is_tried_again(
    store: VolumeStore, server: Server, backend: Backend
) -> None:
    server.answers = [refusal(Invalid, 422), refusal(Invalid, 422)]
    backend.broken = OSError("backend down")
    with pytest.raises(SaveFailed, match="cannot be saved nor undone: backend down"):
        store.save(UID, FIELDS)
    assert store.has_unsaved(UID)
    backend.broken = None
    with pytest.raises(Infeasible):
        store.save_again(UID)
    assert backend.undone == [NAME]


def test_a_volume_whose_save_did_arrive_is_never_undone(
    store: VolumeStore, server: Server, backend: Backend
) -> None:
    """The answer was lost; then an admission policy, which comes before AlreadyExists, says 422."""
    server.lost = [DOWN]
    with pytest.raises(SaveFailed):
        store.save(UID, FIELDS)
    server.answers = [refusal(Invalid, 422)]
    with contextlib.suppress(SaveFailed, Infeasible):
        store.save_again(UID)
    assert NAME in server.objects
    assert backend.undone == []


def test_a_saved_volume_counts_as_saved_even_if_its_record_cannot_be_published(
    store: VolumeStore, backend: Backend
) -> None:
    backend.broken = OSError("disk full")
    assert store.save(UID, FIELDS).name == NAME


# -- remembering


def test_a_claim_that_shows_its_volume_is_no_longer_remembered(store: VolumeStore) -> None:
    store.save(UID, FIELDS)
    store.claim_seen(UID, CLAIM)
    assert store.was_saved(UID)
    store.claim_seen(UID, claim(volume_name=NAME))
    assert not store.was_saved(UID)


def test_a_deleted_claim_is_no_longer_remembered(store: VolumeStore) -> None:
    store.save(UID, FIELDS)
    store.claim_seen(UID, None)
    assert not store.was_saved(UID)


def test_a_deleted_claims_unsaved_volume_is_kept(store: VolumeStore, server: Server) -> None:
    server.answers = [DOWN]
    with pytest.raises(SaveFailed):
        store.save(UID, FIELDS)
    store.claim_seen(UID, None)
    assert store.save_again(UID).name == NAME


def test_a_claim_whose_volume_never_came_and_went_is_not_asked_about(
    store: VolumeStore, server: Server
) -> None:
    assert store.still_wants_volume(CLAIM)
    store.save(UID, FIELDS)
    store.volume_gone(volume(name="another"))
    store.volume_gone(volume(name="static", made_for=None))
    assert store.still_wants_volume(CLAIM)
    assert store.was_saved(UID)
    assert server.reads == 0


@pytest.mark.parametrize(
    ("live", "wants"),
    [
        (CLAIM, True),
        (claim(volume_name=NAME), False),
        (claim(deleting=True), False),
        (claim(uid="made again under its name"), False),
        (None, False),
    ],
)
def test_a_claim_whose_volume_came_and_went_is_asked_about(
    store: VolumeStore, server: Server, live: KubeObject | None, wants: bool
) -> None:
    store.save(UID, FIELDS)
    store.volume_gone(volume())
    assert not store.was_saved(UID)
    if live is not None:
        server.objects[CLAIM.name] = live
    assert store.still_wants_volume(CLAIM) is wants


def test_a_claim_that_cannot_be_asked_about_is_not_guessed_at(
    store: VolumeStore, server: Server
) -> None:
    store.save(UID, FIELDS)
    store.volume_gone(volume())
    server.unreadable = DOWN
    with pytest.raises(Unavailable):
        store.still_wants_volume(CLAIM)


def test_a_second_volume_of_a_claim_ends_the_doubt(store: VolumeStore, server: Server) -> None:
    store.save(UID, FIELDS)
    store.volume_gone(volume())
    server.objects.clear()
    store.save(UID, FIELDS)
    assert store.was_saved(UID)
    assert store.still_wants_volume(CLAIM)
    assert server.reads == 0
