"""What is done about an entry: each rule alone, and what no mixture of facts can bring about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_storage import PersistentVolume
from external_storage.kube.types import (
    LocalVolumeSource,
    ObjectMeta,
    ObjectReference,
    VolumeSpec,
    VolumeStatus,
)
from local_volume_provisioner.config import ClassConfig, CleanPolicy, RequiredIdentity, VolumeMode
from local_volume_provisioner.decide import MOST_FAILURES, Action, View, decide
from local_volume_provisioner.identity import Identity
from local_volume_provisioner.ledger import Record, SavedClass, Use
from local_volume_provisioner.scan import Candidate, Kind
from local_volume_provisioner.states import State

CLASS = ClassConfig(name="c", host_dir="/d", mount_dir="/d", mode=VolumeMode.BLOCK)
SURE = Identity(kind="device", hardware={"wwn": "w1"}, size=1 << 30, boot_id="1", device="8:0")
OTHER = msgspec.structs.replace(SURE, hardware={"wwn": "w2"})
BARE = msgspec.structs.replace(SURE, hardware={})
DISK = Candidate(
    class_config=CLASS, entry="a", kind=Kind.DEVICE, size=1 << 30, identity=SURE, number=8,
    family=frozenset({8}),
)  # fmt: skip


def volume(phase: str, *, claimed: bool | None = None, policy: str = "Delete") -> PersistentVolume:
    claimed = phase in ("Bound", "Released") if claimed is None else claimed
    return PersistentVolume(
        metadata=ObjectMeta(name="v", uid="u1"),
        spec=VolumeSpec(
            capacity={"storage": "1Gi"},
            local=LocalVolumeSource(path="/d/a"),
            claim_ref=ObjectReference(name="claim") if claimed else None,
            persistent_volume_reclaim_policy=policy,
        ),
        status=VolumeStatus(phase=phase),
    )


def record(use: Use, found: Identity = SURE, uid: str = "u1") -> Record:
    return Record(path="/d/a", saved_class=SavedClass.of(CLASS), use=use, identity=found, uid=uid)


def view(**fields: Any) -> View:
    return View(**{"path": "/d/a", "candidate": DISK, "config": CLASS, **fields})


RELEASED = {"volume": volume("Released"), "record": record(Use.USED)}
RETAINED = volume("Released", policy="Retain")
CLAIMED = volume("Available", claimed=True)
LOST = {"record": record(Use.USED)}


@pytest.mark.parametrize(
    ("fields", "action", "state"),
    [
        ({}, Action.OFFER, State.OFFERING),
        ({"candidate": None}, Action.NOTHING, State.MISSING),
        ({"candidate": replace(DISK, busy="mounted")}, Action.NOTHING, State.BUSY),
        ({"duplicate": "of b"}, Action.NOTHING, State.DUPLICATE),
        ({"volume": volume("Available")}, Action.NOTHING, State.AVAILABLE),
        ({"volume": volume("Bound")}, Action.NOTHING, State.BOUND),
        (RELEASED, Action.CLEAN, State.CLEANING),
        (LOST, Action.CLEAN, State.CLEANING),
        ({**RELEASED, "volume": RETAINED}, Action.NOTHING, State.RELEASED),
        ({**RELEASED, "candidate": None}, Action.NOTHING, State.MISSING),
        ({**RELEASED, "duplicate": "of b"}, Action.NOTHING, State.DUPLICATE),
        ({**RELEASED, "dry_run": True}, Action.NOTHING, State.WOULD_CLEAN),
        ({**RELEASED, "brake": "many"}, Action.NOTHING, State.HELD),
        ({**RELEASED, "brake": "many", "approved": True}, Action.CLEAN, State.CLEANING),
        ({**RELEASED, "failures": MOST_FAILURES}, Action.NOTHING, State.NEEDS_ATTENTION),
        ({**RELEASED, "failures": MOST_FAILURES, "approved": True}, Action.CLEAN, State.CLEANING),
        ({**RELEASED, "record": record(Use.CLEAN)}, Action.REMOVE, State.CLEANED),
        # Cleaned for the volume before this one: that says nothing about this one.
        ({**RELEASED, "record": record(Use.CLEAN, uid="u0")}, Action.CLEAN, State.CLEANING),
        ({"record": record(Use.CLEAN)}, Action.OFFER, State.OFFERING),
        ({"record": record(Use.OFFERING)}, Action.OFFER, State.OFFERING),
        # L13, and the case where nobody saw whether it was used.
        ({"record": record(Use.OFFERED)}, Action.NOTHING, State.NEEDS_ATTENTION),
        ({"record": record(Use.OFFERED), "is_empty": True}, Action.OFFER, State.OFFERING),
        ({"record": record(Use.OFFERED), "approved": True}, Action.CLEAN, State.CLEANING),
        ({"record": record(Use.RETIRED)}, Action.NOTHING, State.RETIRED),
        ({"volume": volume("Available"), "retiring": True}, Action.WITHDRAW, State.RETIRED),
        ({"volume": CLAIMED, "retiring": True}, Action.NOTHING, State.BOUND),
        # A class that has left the configuration.
        ({**RELEASED, "config": None}, Action.CLEAN, State.CLEANING),
        ({"config": None}, Action.NOTHING, State.IGNORED),
    ],
)  # fmt: skip
def test_rules(fields: dict[str, Any], action: Action, state: State) -> None:
    found = decide(view(**fields))
    assert (found.action, found.state) == (action, state), found.reason


@pytest.mark.parametrize("known", [RELEASED, LOST])
def test_another_disk_is_never_cleaned_whoever_asks(known: dict[str, Any]) -> None:
    fields = {**known, "candidate": replace(DISK, identity=OTHER), "approved": True}
    assert decide(view(**fields)).state is State.IDENTITY_MISMATCH


def test_a_disk_without_hardware_ids_waits_for_somebody() -> None:
    fields = {
        **RELEASED,
        "candidate": replace(DISK, identity=BARE),
        "record": record(Use.USED, BARE),
    }
    assert decide(view(**fields)).state is State.NEEDS_APPROVAL
    assert decide(view(**fields, approved=True)).action is Action.CLEAN
    placement = replace(CLASS, required_identity=RequiredIdentity.PLACEMENT)
    assert decide(view(**{**fields, "config": placement})).action is Action.CLEAN


def test_policies() -> None:
    manual = replace(CLASS, clean_policy=CleanPolicy.MANUAL)
    never = replace(CLASS, clean_policy=CleanPolicy.NEVER)
    assert decide(view(**{**RELEASED, "config": manual})).state is State.NEEDS_APPROVAL
    assert decide(view(**{**RELEASED, "config": manual}, approved=True)).action is Action.CLEAN
    assert decide(view(**{**RELEASED, "config": never}, approved=True)).state is State.RELEASED
    assert decide(view(**{**LOST, "config": never}, approved=True)).state is State.DIRTY


def test_a_free_volume_grows_and_a_bound_one_is_reported() -> None:
    larger = replace(DISK, size=20 << 30)
    assert decide(view(candidate=larger, volume=volume("Available"))).action is Action.GROW
    bound = decide(view(candidate=larger, volume=volume("Bound")))
    assert bound.action is Action.NOTHING
    assert "its volume says 1073741824" in bound.reason
    smaller = replace(DISK, size=1 << 29)
    assert decide(view(candidate=smaller, volume=volume("Available"))).action is Action.NOTHING


views = st.builds(
    View,
    path=st.just("/d/a"),
    candidate=st.sampled_from(
        [None, DISK, replace(DISK, identity=OTHER), replace(DISK, identity=BARE)]
    ),
    duplicate=st.sampled_from(["", "of b"]),
    volume=st.sampled_from(
        [None, *(volume(p) for p in ("Available", "Bound", "Released", "Failed", "Pending"))]
    ),
    record=st.one_of(
        st.none(),
        st.builds(
            record,
            st.sampled_from(Use),
            st.sampled_from([SURE, BARE]),
            st.sampled_from(["u0", "u1"]),
        ),
    ),
    config=st.sampled_from([None, CLASS, replace(CLASS, clean_policy=CleanPolicy.NEVER)]),
    approved=st.booleans(),
    retiring=st.booleans(),
    failures=st.sampled_from([0, MOST_FAILURES]),
    brake=st.sampled_from(["", "many"]),
    dry_run=st.booleans(),
    is_empty=st.booleans(),
)  # fmt: skip


@given(views)
def test_no_mixture_of_facts_cleans_what_must_not_be(one: View) -> None:
    found = decide(one)
    if found.action is not Action.CLEAN:
        return
    assert one.candidate is not None
    assert one.recorded is None or one.candidate.identity != OTHER
    assert one.recorded is not None or one.approved
    assert not one.duplicate
    assert not one.dry_run
    assert one.volume is None or one.volume.status.phase == "Released"
    assert one.volume is not None or (one.record and one.record.use is not Use.CLEAN)
    assert one.config is None or one.config.clean_policy is not CleanPolicy.NEVER


@given(views)
def test_nothing_dirty_is_offered(one: View) -> None:
    if decide(one).action is Action.OFFER and one.record is not None:
        assert not one.record.dirty
        assert one.record.use is not Use.OFFERED or one.is_empty
