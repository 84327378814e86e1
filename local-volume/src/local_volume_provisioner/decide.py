"""What is to be done about one entry: a pure function, and the only place that decides to clean."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from external_storage import PersistentVolume
from external_storage.kube import quantity
from local_volume_provisioner import records
from local_volume_provisioner.config import ClassConfig, CleanPolicy, RequiredIdentity
from local_volume_provisioner.identity import Comparison, Identity, Verdict, compare
from local_volume_provisioner.ledger import Record, Use
from local_volume_provisioner.names import rounded
from local_volume_provisioner.scan import Candidate
from local_volume_provisioner.states import State

MOST_FAILURES = 8


class Action(StrEnum):
    """What the agent does."""

    NOTHING = "nothing"
    OFFER = "offer"
    GROW = "grow"
    CLEAN = "clean"
    REMOVE = "remove"
    """Delete the volume of what has been cleaned."""
    WITHDRAW = "withdraw"
    """Delete a free volume: its disk is retired, or is not what or where it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that is known about one path."""

    path: str
    candidate: Candidate | None
    absent: str = "it is not there"
    """Why there is no candidate."""
    duplicate: str = ""
    doubt: str = ""
    """Why it must not be taken for granted that its volume is gone."""
    cluster: str = ""
    """Ours; empty if that cannot be read."""
    volume: PersistentVolume | None = None
    volume_identity: Identity | None = None
    """From the volume's annotation."""
    record: Record | None = None
    config: ClassConfig | None = None
    approved: bool = False
    """``local-volume clean`` has been said."""
    retiring: bool = False
    failures: int = 0
    """Wipes in a row that have failed."""
    failure: str = ""
    brake: str = ""
    dry_run: bool = False
    is_empty: bool = False
    """A mounted directory without files."""

    @property
    def recorded(self) -> Identity | None:
        """The node's own record before the annotation, which others can write."""
        return self.record.identity if self.record is not None else self.volume_identity


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done, and what is shown."""

    action: Action
    state: State
    reason: str = ""


def decide(view: View) -> Decision:
    """The one place where it is decided; called again, on fresh facts, before each wipe."""
    if view.volume is not None:
        return _with_volume(view, view.volume)
    return _without_volume(view)


_bytes = lru_cache(quantity.to_bytes)  # a node's disks have few sizes


def _nothing(state: State, reason: str = "") -> Decision:
    return Decision(Action.NOTHING, state, reason)


def _with_volume(view: View, volume: PersistentVolume) -> Decision:
    phase = volume.status.phase
    if phase == "Released" and _is_cleaned(view, volume):
        # Also when the disk has been pulled since: nothing of the user is on it.
        return Decision(Action.REMOVE, State.CLEANED)
    if view.duplicate:
        return _unusable(volume, State.DUPLICATE, view.duplicate)
    if view.candidate is None:
        return _unusable(volume, State.MISSING, view.absent)
    found = _compared(view)
    if found.verdict is Verdict.DIFFERENT:
        return _unusable(volume, State.IDENTITY_MISMATCH, found.why)
    if volume.metadata.deletion_timestamp is not None:
        return _nothing(State.RELEASED, "its volume is being deleted by somebody else")
    if phase == "Released":
        policy = volume.spec.persistent_volume_reclaim_policy
        if policy != "Delete":
            return _nothing(State.RELEASED, f"its reclaim policy is {policy}")
        return _gate(view, found, State.RELEASED)
    if phase == "Failed":
        return _nothing(State.NEEDS_ATTENTION, f"its phase is Failed: {volume.status.message}")
    return _in_service(view, volume, view.candidate)


def _unusable(volume: PersistentVolume, state: State, reason: str) -> Decision:
    """Nobody shall be given a volume that leads to nothing, or to somebody else's disk."""
    is_leaving = volume.metadata.deletion_timestamp is not None
    if volume.status.phase == "Available" and volume.spec.claim_ref is None and not is_leaving:
        return Decision(Action.WITHDRAW, state, reason)
    return _nothing(state, reason)


def _in_service(view: View, volume: PersistentVolume, candidate: Candidate) -> Decision:
    is_free = volume.spec.claim_ref is None and volume.status.phase != "Bound"
    state = State.AVAILABLE if is_free else State.BOUND
    if view.retiring and is_free:
        return Decision(Action.WITHDRAW, State.RETIRED, "its volume is withdrawn")
    has = _bytes(volume.spec.capacity.get("storage", "0"))
    size = rounded(candidate.size)
    if size > has and is_free:
        return Decision(Action.GROW, state)
    reason = ""
    if size != has:
        reason = f"its size is {size} bytes now, its volume says {has}"
    elif view.retiring:
        reason = "it will be retired when its claim is gone"
    return _nothing(state, reason)


def _without_volume(view: View) -> Decision:
    record = view.record
    if record is not None and record.use is Use.RETIRED:
        return _nothing(State.RETIRED)
    if view.doubt:
        return _nothing(State.NEEDS_ATTENTION, view.doubt)
    if view.duplicate:
        return _nothing(State.DUPLICATE, view.duplicate)
    if view.candidate is None:
        return _nothing(State.MISSING, view.absent)
    if record is None or record.use is Use.OFFERING:
        return _offer(view, view.candidate)
    found = _compared(view)
    if found.verdict is Verdict.DIFFERENT:
        if record.use is Use.CLEAN:
            # The one that was here before held nothing any more; this one is new.
            return _offer(view, view.candidate)
        text = f"{found.why}: another disk is here; local-volume offer takes it as new"
        return _nothing(State.IDENTITY_MISMATCH, text)
    if view.retiring and not record.dirty:
        return _nothing(State.RETIRED)
    if record.use is Use.CLEAN and not _foreign(view, record):
        return _offer(view, view.candidate)
    if not record.dirty:
        return _after_a_lost_volume(view, view.candidate, found)
    if not view.approved and (why := _foreign(view, record) or _wanted_kept(record)):
        return _nothing(State.NEEDS_APPROVAL, f"{why}: local-volume clean wipes it")
    return _gate(view, found, State.DIRTY)


def _foreign(view: View, record: Record) -> str:
    """Whether its volume may live on in a cluster that we do not see."""
    if record.cluster == view.cluster != "":
        return ""
    if not view.cluster:
        return "it cannot be read which cluster this is"
    return (
        "its volume was in another cluster" if record.cluster else "nobody knows of which cluster"
    )


def _wanted_kept(record: Record) -> str:
    """To delete the volume is how people keep what is on a disk that is to be retained."""
    if record.policy == "Delete":
        return ""
    if not record.policy:
        return "its volume is gone, and nobody knows what its reclaim policy was"
    return f"its volume is gone, and its reclaim policy was {record.policy}"


def _offer(view: View, candidate: Candidate) -> Decision:
    if view.config is None:
        return _nothing(State.IGNORED, "its class is not in the configuration any more")
    if candidate.busy:
        return _nothing(State.BUSY, candidate.busy)
    return Decision(Action.OFFER, State.OFFERING)


def _after_a_lost_volume(view: View, candidate: Candidate, found: Comparison) -> Decision:
    """Its volume was deleted while we were not looking: nobody knows whether it had been used."""
    if view.is_empty:
        return _offer(view, candidate)
    if view.approved:
        return _gate(view, found, State.DIRTY)
    text = (
        "it has no volume any more, and nobody knows whether it has been used: "
        "local-volume clean wipes it, local-volume offer offers it as it is"
    )
    return _nothing(State.NEEDS_ATTENTION, text)


def _gate(view: View, found: Comparison, kept: State) -> Decision:
    """Whether it may be cleaned now."""
    config = view.config or (view.record.saved_class.config() if view.record is not None else None)
    if config is None:
        text = "its class is not in the configuration and was never seen in it"
        return _nothing(State.NEEDS_ATTENTION, text)
    if config.clean_policy is CleanPolicy.NEVER:
        return _nothing(kept, "its class has cleanPolicy never")
    sure = found.verdict is Verdict.SAME or (
        found.verdict is Verdict.LIKELY and config.required_identity is RequiredIdentity.PLACEMENT
    )
    if not sure and not view.approved:
        text = f"it cannot be told for sure which disk it is ({found.why}): local-volume clean"
        return _nothing(State.NEEDS_APPROVAL, text)
    if config.clean_policy is CleanPolicy.MANUAL and not view.approved:
        return _nothing(State.NEEDS_APPROVAL, "its class has cleanPolicy manual")
    if view.failures >= MOST_FAILURES and not view.approved:
        text = f"cleaning failed {view.failures} times: {view.failure}"
        return _nothing(State.NEEDS_ATTENTION, text)
    if view.brake and not view.approved:
        return _nothing(State.HELD, view.brake)
    if view.dry_run:
        return _nothing(State.WOULD_CLEAN, f"{config.method}, but for --dry-run")
    return Decision(Action.CLEAN, State.CLEANING, view.failure)


def _compared(view: View) -> Comparison:
    if view.recorded is None or view.candidate is None:
        return Comparison(Verdict.UNKNOWN, "nothing was written down about it")
    return compare(view.recorded, view.candidate.identity)


def _is_cleaned(view: View, volume: PersistentVolume) -> bool:
    record = view.record
    return record is not None and record.use is Use.CLEAN and records.is_release(record, volume)
