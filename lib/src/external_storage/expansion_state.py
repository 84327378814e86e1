"""Expansion, the pure part: what an expansion needs next, read off the claim and its volume.

The rules are those of Kubernetes' own resizer, whose kubelet and quota rely on them: the size that
the back end is about to be asked for is written into the claim before; a larger size that may have
been begun is brought to its end before a smaller one counts; nothing ever becomes smaller.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from external_storage.decision import PROCEED, Decision, skip
from external_storage.kube import quantity
from external_storage.kube.errors import cut
from external_storage.kube.names import PHASE_BOUND
from external_storage.kube.types import (
    KubeObject,
    PersistentVolume,
    PersistentVolumeClaim,
    StorageClass,
)
from external_storage.persistent_volume import is_ours
from external_storage.provisioner import Expanded

STORAGE = "storage"
NODE_MESSAGE = (
    "The node has to grow the file system: while a pod uses the claim, or when the next one starts."
)


class Status(StrEnum):
    """How far an expansion has come: ``status.allocatedResourceStatuses`` of the claim."""

    IN_PROGRESS = "ControllerResizeInProgress"
    INFEASIBLE = "ControllerResizeInfeasible"
    NODE_PENDING = "NodeResizePending"
    NODE_IN_PROGRESS = "NodeResizeInProgress"
    NODE_INFEASIBLE = "NodeResizeInfeasible"


class Condition(StrEnum):
    """The conditions of a claim that are about its expansion."""

    RESIZING = "Resizing"
    NODE_PENDING = "FileSystemResizePending"
    ERROR = "ControllerResizeError"
    NODE_ERROR = "NodeResizeError"


_WITH_THE_NODE = (Status.NODE_PENDING, Status.NODE_IN_PROGRESS)
_OF_THE_NODE = (*_WITH_THE_NODE, Status.NODE_INFEASIBLE)


# -- which claims


def wants_more(claim: PersistentVolumeClaim) -> bool:
    """Whether a Bound claim asks for more than it is known to have."""
    if claim.status.phase != PHASE_BOUND or not claim.spec.volume_name or _terminating(claim):
        return False
    requested = claim.spec.resources.requests.get(STORAGE)
    reported = claim.status.capacity.get(STORAGE)
    if requested is None or reported is None or requested == reported:
        return False
    return quantity.to_bytes(requested) > quantity.to_bytes(reported)


def request_changed(old: PersistentVolumeClaim, new: PersistentVolumeClaim) -> bool:
    """Whether another size is asked for: an expansion that failed may now succeed."""
    requests = old.spec.resources.requests, new.spec.resources.requests
    return requests[0].get(STORAGE) != requests[1].get(STORAGE)


def should_expand(
    claim: PersistentVolumeClaim, volume: PersistentVolume, *, names: Collection[str]
) -> Decision:
    """Whether the volume is to be grown for the claim."""
    if not wants_more(claim):
        return skip("the claim asks for no more than it has, or is not Bound, or is being deleted")
    if not is_ours(volume, names):
        return skip("the volume is another provisioner's")
    reference = volume.spec.claim_ref
    if reference is None or reference.uid != claim.uid or volume.name != claim.spec.volume_name:
        return skip("the volume is another claim's")
    if volume.status.phase != PHASE_BOUND:
        return skip("the volume is not Bound")
    if _terminating(volume):
        return skip("the volume is being deleted")
    return PROCEED


def why_not_begun(claim: PersistentVolumeClaim, storage_class: StorageClass | None) -> str | None:
    """Why the class forbids the expansion, or None. One that was begun is brought to its end."""
    if claim.status.allocated_resource_statuses.get(STORAGE):
        return None
    if storage_class is None:
        return "the class does not exist any more"
    if not storage_class.allow_volume_expansion:
        return f"class {storage_class.name} does not allow expansion any more"
    return None


def _terminating(about: KubeObject) -> bool:
    return about.metadata.deletion_timestamp is not None


# -- what comes next


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What claim and volume say; bytes."""

    requested: int
    reported: int
    """The capacity in the claim's status: what its user is told."""
    allocated: int | None
    """What the back end was last to be asked for; it stays when that has ended."""
    status: str
    """One of ``Status``, or empty."""
    volume: int


class Do(StrEnum):
    """The steps of an expansion, in their order; each may be repeated after a crash."""

    NOTHING = "nothing"
    MARK = "mark"
    """Say in the claim what the back end will be asked for."""
    ASK = "ask"
    """Have the author's code grow the asset."""
    REFUSE = "refuse"
    """Say in the claim that this size cannot be had."""
    RECORD = "record"
    """Write the new capacity into the volume."""
    FINISH = "finish"
    """Tell the claim's user of the new capacity."""
    AWAIT_NODE = "await node"
    """Leave the rest to the kubelet."""


@dataclass(frozen=True, slots=True)
class Step:
    """What to do next, with which size (bytes), or why there is nothing to do."""

    do: Do
    size: int = 0
    reason: str = ""


def sizes_of(claim: PersistentVolumeClaim, volume: PersistentVolume) -> Sizes:
    status = claim.status
    requested = _size(claim.spec.resources.requests) or 0
    reported = _size(status.capacity)
    return Sizes(
        requested=requested,
        reported=requested if reported is None else reported,
        allocated=_size(status.allocated_resources),
        status=status.allocated_resource_statuses.get(STORAGE, ""),
        volume=_size(volume.spec.capacity) or 0,
    )


def next_step(
    sizes: Sizes,
    *,
    failed: int | None = None,
    refused: int | None = None,
    expanded: Expanded | None = None,
) -> Step:
    """The next step of the expansion; ``NOTHING`` once it has ended, or is the kubelet's to end.

    Args:
        failed: the allocated size at which the back end is known to have failed, and to have ended.
        refused: the allocated size that has just been found infeasible.
        expanded: what the back end has just answered. Lost in a crash, it is asked for again: only
            the author knows whether the node has a part in it.
    """
    if sizes.requested <= sizes.reported:
        return Step(Do.NOTHING, reason="the claim has what it asks for")
    if refused is not None:
        if (sizes.status, sizes.allocated) == (Status.IN_PROGRESS, refused):
            return Step(Do.REFUSE, refused)
        return Step(Do.NOTHING, reason="what was refused has been replaced")
    aim = sizes.requested
    begun = False
    if sizes.allocated is not None:
        # Whoever cannot say how the earlier call ended must not take a smaller request for one
        # that undoes it: the back end may come to the larger size at any moment.
        begun = sizes.status == Status.IN_PROGRESS and sizes.allocated != failed
        if begun or sizes.status in _OF_THE_NODE:
            aim = sizes.allocated
    size = max(aim, sizes.volume, sizes.reported)
    if sizes.status in _WITH_THE_NODE and sizes.volume >= aim:
        return Step(Do.NOTHING, reason="the node is to grow the file system")
    if not begun and (sizes.status, sizes.allocated) != (Status.IN_PROGRESS, size):
        return Step(Do.MARK, size)
    if expanded is None or expanded.capacity < size:
        return Step(Do.ASK, size)
    if expanded.capacity > sizes.volume:
        return Step(Do.RECORD, expanded.capacity)
    return Step(Do.AWAIT_NODE if expanded.node_step else Do.FINISH, size)


def _size(amounts: Mapping[str, str]) -> int | None:
    text = amounts.get(STORAGE)
    return None if text is None else quantity.to_bytes(text)


# -- the patches, for the claim's status (strategic merge) and for the volume


def claim_patch(
    claim: PersistentVolumeClaim, step: Step, *, now: str, message: str = ""
) -> dict[str, Any]:
    """The patch of ``status`` for a step; it is refused if the claim is not the one read.

    Args:
        now: for conditions that begin, as RFC 3339.
        message: why the size was refused.
    """
    patched: dict[str, Any] = {}
    status: Status | None = None
    wanted: dict[Condition, str] = {}
    match step.do:
        case Do.MARK:
            patched["allocatedResources"] = _amount(step.size)
            wanted, status = {Condition.RESIZING: ""}, Status.IN_PROGRESS
        case Do.REFUSE:
            wanted = {Condition.RESIZING: "", Condition.ERROR: cut(message)}
            status = Status.INFEASIBLE
        case Do.AWAIT_NODE:
            wanted, status = {Condition.NODE_PENDING: NODE_MESSAGE}, Status.NODE_PENDING
        case Do.FINISH:
            patched["capacity"] = _amount(step.size)
        case _:
            raise ValueError(f"{step.do}: no change of the claim")
    patched["allocatedResourceStatuses"] = {STORAGE: status.value if status else None}
    patched["conditions"] = _conditions(claim, wanted, now)
    return {"metadata": _precondition(claim), "status": patched}


def volume_patch(volume: PersistentVolume, capacity: int) -> dict[str, Any]:
    """The patch that gives the volume its new capacity (bytes)."""
    return {"metadata": _precondition(volume), "spec": {"capacity": _amount(capacity)}}


def _conditions(
    claim: PersistentVolumeClaim, wanted: Mapping[Condition, str], now: str
) -> list[dict[str, Any]]:
    """Of the conditions about expansion only these are to be left; others are not touched."""
    present = {condition.type: condition for condition in claim.status.conditions}
    changes: list[dict[str, Any]] = [
        {"type": kind.value, "$patch": "delete"}
        for kind in Condition
        if kind in present and kind not in wanted
    ]
    for kind, message in wanted.items():
        old = present.get(kind)
        since = old.last_transition_time if old is not None and old.status == "True" else None
        changes.append(
            {
                "type": kind.value,
                "status": "True",
                "message": message,
                "lastTransitionTime": since or now,
            }
        )
    return changes


def _amount(size: int) -> dict[str, str]:
    return {STORAGE: quantity.from_bytes(size)}


def _precondition(about: KubeObject) -> dict[str, str]:
    return {"uid": about.uid, "resourceVersion": about.metadata.resource_version}
