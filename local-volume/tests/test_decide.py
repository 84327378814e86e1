"""What is done about an entry: each rule alone, and what no mixture of facts can bring about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product, starmap
from typing import Any

import msgspec
import pytest

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
            claim_ref=ObjectReference(name="claim", uid="c1") if claimed else None,
            persistent_volume_reclaim_policy=policy,
        ),
        status=VolumeStatus(phase=phase),
    )


def record(use: Use, found: Identity = SURE, uid: str = "u1", **fields: Any) -> Record:
    fields = {"claim": "c1", "policy": "Delete", "cluster": "k1", **fields}
    return Record(
        path="/d/a", saved_class=SavedClass.of(CLASS), use=use, identity=found, uid=uid, **fields
    )


def view(**fields: Any) -> View:
    return View(**{"path": "/d/a", "candidate": DISK, "config": CLASS, "cluster": "k1", **fields})


RELEASED = {"volume": volume("Released"), "record": record(Use.USED)}
RETAINED = volume("Released", policy="Retain")
CLAIMED = volume("Available", claimed=True)
LOST = {"record": record(Use.USED)}
FREE = {"volume": volume("Available"), "record": record(Use.OFFERED)}
OTHER_DISK = replace(DISK, identity=OTHER)


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
        # Cleaned for the claim before this one: the volume was taken back into service since.
        ({**RELEASED, "record": record(Use.CLEAN, claim="c0")}, Action.CLEAN, State.CLEANING),
        ({"record": record(Use.CLEAN)}, Action.OFFER, State.OFFERING),
        # The asset was to be kept, or nobody knows; and it may live on in another cluster.
        ({"record": record(Use.USED, policy="Retain")}, Action.NOTHING, State.NEEDS_APPROVAL),
        ({"record": record(Use.CLEANING, policy="")}, Action.NOTHING, State.NEEDS_APPROVAL),
        ({"record": record(Use.USED, cluster="k0")}, Action.NOTHING, State.NEEDS_APPROVAL),
        ({"record": record(Use.CLEAN, cluster="k0")}, Action.NOTHING, State.NEEDS_ATTENTION),
        ({**LOST, "cluster": ""}, Action.NOTHING, State.NEEDS_APPROVAL),
        ({**LOST, "cluster": "", "approved": True}, Action.CLEAN, State.CLEANING),
        ({**LOST, "doubt": "there", "approved": True}, Action.NOTHING, State.NEEDS_ATTENTION),
        # A volume that leads to nothing, or to another disk, is given to nobody.
        ({**FREE, "candidate": None}, Action.WITHDRAW, State.MISSING),
        ({**FREE, "duplicate": "of b"}, Action.WITHDRAW, State.DUPLICATE),
        ({**FREE, "candidate": OTHER_DISK}, Action.WITHDRAW, State.IDENTITY_MISMATCH),
        ({"volume": CLAIMED, "candidate": None}, Action.NOTHING, State.MISSING),
        ({"volume": volume("Bound"), "candidate": None}, Action.NOTHING, State.MISSING),
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


ODD: list[dict[str, Any]] = [{"claim": "c0"}, {"policy": "Retain"}, {"cluster": "k0"}]
CANDIDATES = [None, DISK, replace(DISK, identity=OTHER), replace(DISK, identity=BARE)]
VOLUMES = [None, RETAINED, *map(volume, ("Available", "Bound", "Released", "Failed", "Pending"))]
RECORDS = [
    None,
    *starmap(record, product(Use, (SURE, BARE), ("u0", "u1"))),
    *(record(use, SURE, "u1", **fields) for use in Use for fields in ODD),
]
CONFIGS = [
    None,
    CLASS,
    replace(CLASS, clean_policy=CleanPolicy.NEVER),
    replace(CLASS, required_identity=RequiredIdentity.PLACEMENT),
]
SWITCHES = {
    "duplicate": ("", "of b"),
    "failures": (0, MOST_FAILURES),
    "brake": ("", "many"),
    "doubt": ("", "its volume is still there"),
    **dict.fromkeys(("approved", "retiring", "dry_run", "is_empty"), (False, True)),
}


def mixtures() -> Iterator[View]:
    """Every mixture of what the decision looks at."""
    for switches in product(*SWITCHES.values()):
        fields = dict(zip(SWITCHES, switches, strict=True))
        if fields["failures"] and fields["brake"]:
            continue  # either is enough
        # These two are not looked at while there is a volume.
        volumes = [None] if fields["doubt"] or fields["is_empty"] else VOLUMES
        for found, held, known, config in product(CANDIDATES, volumes, RECORDS, CONFIGS):
            yield view(candidate=found, volume=held, record=known, config=config, **fields)


def is_another_disk(one: View) -> bool:
    """Whether the entry's disk has hardware ids that are not those on record."""
    known = one.recorded.hardware if one.recorded else {}
    found = one.candidate.identity.hardware if one.candidate else {}
    return bool(known and found and known != found)


def is_retained(one: View) -> bool:
    """Whether its reclaim policy says that nobody wipes it; of a volume in service that holds
    whoever asks, after its deletion a person may decide."""
    if one.volume:
        return one.volume.spec.persistent_volume_reclaim_policy != "Delete"
    return not one.approved and one.record is not None and one.record.policy != "Delete"


def is_foreign(one: View) -> bool:
    return not one.volume and one.record is not None and one.record.cluster != one.cluster


def forbids_cleaning(one: View) -> dict[str, object]:
    """The facts of which each alone forbids to clean, by what they say."""
    phase = one.volume.status.phase if one.volume else ""
    return {
        "nothing is there": one.candidate is None,
        "another disk is there": is_another_disk(one),
        "nobody knows which disk it was": one.recorded is None and not one.approved,
        "a second name of a device": one.duplicate,
        "a dry run": one.dry_run,
        "the volume may be in use": phase not in ("", "Released"),
        "clean already": one.record
        and one.record.use is Use.CLEAN
        and one.record.cluster == one.cluster
        and (not one.volume or (one.record.uid, one.record.claim) == ("u1", "c1")),
        "nothing is known of it": not one.volume and not one.record,
        "the volume lives on elsewhere": not one.volume and one.doubt,
        "it is to be retained": is_retained(one),
        "its volume may be in another cluster": is_foreign(one) and not one.approved,
        "the class says never": one.config and one.config.clean_policy is CleanPolicy.NEVER,
    }


def test_no_mixture_of_facts_cleans_what_must_not_be_and_none_offers_what_is_dirty() -> None:
    done = dict.fromkeys(Action, 0)
    for one in mixtures():
        action = decide(one).action
        done[action] += 1
        if action is Action.CLEAN:
            against = [why for why, holds in forbids_cleaning(one).items() if holds]
            assert not against, one
        if action is Action.OFFER and one.record is not None:
            assert not one.record.dirty, one
            assert one.record.use is not Use.OFFERED or one.is_empty, one
            assert not one.doubt, one
            is_new = one.record.use is Use.OFFERING or is_another_disk(one)
            assert is_new or one.is_empty or not is_foreign(one), one
        if action is Action.REMOVE:
            assert one.volume is not None
            assert one.record is not None
            assert (one.record.use, one.record.uid, one.record.claim) == (Use.CLEAN, "u1", "c1")
            assert one.volume.status.phase == "Released"
        if action is Action.WITHDRAW:
            assert one.volume is not None
            assert one.volume.spec.claim_ref is None
            assert one.volume.status.phase in ("Available", "Pending")
    assert done[Action.CLEAN]
    assert done[Action.OFFER]
