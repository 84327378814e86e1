"""The pure decisions about expansion: which claims, and which step comes next."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from external_storage import Expanded, PersistentVolume, PersistentVolumeClaim
from external_storage.expansion_state import (
    Condition,
    Do,
    Sizes,
    Status,
    Step,
    claim_patch,
    next_step,
    request_changed,
    should_expand,
    sizes_of,
    volume_patch,
    wants_more,
    why_not_begun,
)
from external_storage.kube.types import ClaimCondition, ClaimStatus
from external_storage.testing.builders import PROVISIONER, claim, storage_class, volume

NOW = "2026-05-01T12:00:00Z"
LONG_AGO = "2026-01-01T00:00:00Z"
GI = 2**30


def bound(request: str = "2Gi", capacity: str | None = "1Gi", **status: Any) -> Any:
    """A Bound claim, with what its status says beside that."""
    made = claim(storage=request, volume_name=f"pvc-{claim().uid}")
    told = {} if capacity is None else {"storage": capacity}
    filled = ClaimStatus(**{"phase": "Bound", "capacity": told, **status})
    return msgspec.structs.replace(made, status=filled)


def state(**changes: Any) -> Sizes:
    """A volume of 1 that is asked to be 5."""
    start = Sizes(requested=5, reported=1, allocated=None, status="", volume=1)
    return dataclasses.replace(start, **changes)


# -- which claims


@pytest.mark.parametrize(
    ("request_", "capacity", "more"),
    [
        ("2Gi", "1Gi", True),
        ("1Gi", "1Gi", False),
        ("1Gi", "2Gi", False),
        ("1024Mi", "1Gi", False),
        ("1073741825", "1Gi", True),
        ("1073741824500m", "1Gi", True),
        ("2Gi", None, False),
    ],
)
def test_a_claim_wants_more_when_it_asks_for_more_bytes_than_it_is_known_to_have(
    request_: str, capacity: str | None, more: bool
) -> None:
    assert wants_more(bound(request_, capacity)) is more


def test_a_claim_that_is_not_bound_or_on_its_way_out_wants_nothing() -> None:
    grown = bound()
    assert wants_more(grown)
    leaving = msgspec.structs.replace(grown, metadata=claim(deleting=True).metadata)
    lost = msgspec.structs.replace(
        grown, status=msgspec.structs.replace(grown.status, phase="Lost")
    )
    without = msgspec.structs.replace(grown, spec=claim(storage="2Gi").spec)
    assert not any(map(wants_more, (leaving, lost, without)))


def test_only_another_size_counts_as_another_request() -> None:
    assert request_changed(bound("2Gi"), bound("3Gi"))
    assert request_changed(bound("3Gi"), bound("2Gi"))
    assert not request_changed(bound("2Gi", "1Gi"), bound("2Gi", "2Gi"))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (volume(provisioner="example.com/other"), "the volume is another provisioner's"),
        (volume(made_for=None, name=volume().name), "the volume is another claim's"),
        (volume(made_for=claim(name="b"), name=volume().name), "the volume is another claim's"),
        (volume(name="pvc-other"), "the volume is another claim's"),
        (volume(phase="Released"), "the volume is not Bound"),
        (volume(deleting=True), "the volume is being deleted"),
    ],
)
def test_a_volume_that_is_not_this_claims_is_not_grown(made: PersistentVolume, reason: str) -> None:
    assert should_expand(bound(), volume(), names=(PROVISIONER,)).proceed
    decision = should_expand(bound(), made, names=(PROVISIONER,))
    assert (decision.proceed, decision.reason) == (False, reason)


def test_a_bound_volume_that_nobody_asked_to_grow_is_not_grown() -> None:
    assert not should_expand(bound("1Gi"), volume(), names=(PROVISIONER,)).proceed


def test_the_class_must_allow_an_expansion_but_cannot_stop_one_that_has_begun() -> None:
    assert why_not_begun(bound(), storage_class(allow_expansion=True)) is None
    for refusing in (storage_class(allow_expansion=False), storage_class(), None):
        assert why_not_begun(bound(), refusing)
        begun = bound(allocated_resource_statuses={"storage": Status.IN_PROGRESS})
        assert why_not_begun(begun, refusing) is None


# -- the next step


def test_the_steps_without_the_node() -> None:
    done = Expanded(6)
    assert next_step(state()) == Step(Do.MARK, 5)
    marked = state(status=Status.IN_PROGRESS, allocated=5)
    assert next_step(marked) == Step(Do.ASK, 5)
    assert next_step(marked, expanded=done) == Step(Do.RECORD, 6)
    recorded = dataclasses.replace(marked, volume=6)
    assert next_step(recorded, expanded=done) == Step(Do.FINISH, 6)
    assert next_step(state(reported=6, volume=6, allocated=5)).do is Do.NOTHING


def test_the_steps_with_the_node() -> None:
    recorded = state(status=Status.IN_PROGRESS, allocated=5, volume=5)
    assert next_step(recorded, expanded=Expanded(5, node_step=True)) == Step(Do.AWAIT_NODE, 5)
    for status in (Status.NODE_PENDING, Status.NODE_IN_PROGRESS):
        waiting = state(status=status, allocated=5, volume=5)
        assert next_step(waiting) == Step(Do.NOTHING, reason="the node is to grow the file system")


def test_what_the_back_end_answered_before_a_crash_is_asked_for_again() -> None:
    recorded = state(status=Status.IN_PROGRESS, allocated=5, volume=6)
    assert next_step(recorded) == Step(Do.ASK, 6)


def test_a_volume_that_was_made_larger_than_asked_for_is_not_asked_to_be_smaller() -> None:
    assert next_step(state(volume=9)) == Step(Do.MARK, 9)
    assert next_step(state(requested=5, reported=9, volume=9)).do is Do.NOTHING


def test_what_the_user_was_told_is_never_taken_back() -> None:
    odd = state(requested=8, reported=5, status=Status.IN_PROGRESS, allocated=2)
    assert next_step(odd) == Step(Do.ASK, 5)
    recorded = dataclasses.replace(odd, volume=5)
    assert next_step(recorded, expanded=Expanded(5)) == Step(Do.FINISH, 5)


def test_a_larger_request_that_may_be_under_way_comes_before_a_smaller_one() -> None:
    lowered = state(requested=2, status=Status.IN_PROGRESS, allocated=5)
    assert next_step(lowered) == Step(Do.ASK, 5)


def test_a_request_that_grew_again_waits_for_the_one_under_way() -> None:
    assert next_step(state(requested=8, status=Status.IN_PROGRESS, allocated=5)) == Step(Do.ASK, 5)


@pytest.mark.parametrize("status", [Status.INFEASIBLE, Status.IN_PROGRESS])
def test_a_smaller_request_counts_when_the_larger_is_known_to_have_failed(status: Status) -> None:
    failed = 5 if status is Status.IN_PROGRESS else None
    lowered = state(requested=2, status=status, allocated=5)
    assert next_step(lowered, failed=failed) == Step(Do.MARK, 2)
    assert next_step(lowered, failed=4 if failed else None).size == (5 if failed else 2)


def test_a_smaller_request_is_never_below_the_volume() -> None:
    lowered = state(requested=2, status=Status.INFEASIBLE, allocated=9, volume=3)
    assert next_step(lowered) == Step(Do.MARK, 3)


def test_a_size_that_was_refused_is_only_written_while_it_is_the_one_in_the_claim() -> None:
    marked = state(status=Status.IN_PROGRESS, allocated=5)
    assert next_step(marked, refused=5) == Step(Do.REFUSE, 5)
    assert next_step(marked, refused=4).do is Do.NOTHING
    assert next_step(state(status=Status.INFEASIBLE, allocated=5), refused=5).do is Do.NOTHING


def test_what_failed_is_marked_again_before_it_is_asked_for_again() -> None:
    """While the claim says infeasible, a smaller request would count at once."""
    assert next_step(state(status=Status.INFEASIBLE, allocated=5)) == Step(Do.MARK, 5)
    failed = state(status=Status.IN_PROGRESS, allocated=5)
    assert next_step(failed, failed=5) == Step(Do.ASK, 5)


def test_a_node_that_failed_is_given_another_try_at_the_same_size() -> None:
    failed = state(requested=8, status=Status.NODE_INFEASIBLE, allocated=5, volume=5)
    assert next_step(failed) == Step(Do.MARK, 5)


@dataclass
class Cluster:
    """Claim, volume and back end as one: what each step does to them, and what must hold."""

    sizes: Sizes
    asset: int
    limit: int
    extra: int
    node_step: bool
    failed: int | None = None
    refused: int | None = None
    expanded: Expanded | None = None

    def take(self, step: Step) -> None:
        before = self.sizes
        change: dict[str, Any] = {}
        match step.do:
            case Do.MARK:
                change = {"allocated": step.size, "status": Status.IN_PROGRESS}
            case Do.ASK:
                self.ask(step.size)
            case Do.REFUSE:
                change = {"status": Status.INFEASIBLE}
            case Do.RECORD:
                change = {"volume": step.size}
            case Do.FINISH:
                change = {"reported": step.size, "status": ""}
            case Do.AWAIT_NODE:
                change = {"status": Status.NODE_PENDING}
        self.sizes = dataclasses.replace(before, **change)
        assert self.sizes.volume >= before.volume
        assert self.sizes.reported >= before.reported

    def ask(self, size: int) -> None:
        assert size >= self.sizes.volume, "asked for less than the volume has"
        assert size >= self.sizes.reported, "asked for less than the user was told"
        assert self.sizes.status == Status.IN_PROGRESS, "asked without having said so"
        assert self.sizes.allocated is not None
        if size > self.limit and size > self.asset:
            self.failed = self.refused = self.sizes.allocated
        else:
            self.asset = max(self.asset, size + self.extra)
            self.failed, self.expanded = None, Expanded(self.asset, self.node_step)

    def crash(self) -> None:
        self.failed = self.refused = self.expanded = None

    def run(self, crashes: Iterator[bool]) -> Step:
        """Until nothing is left to do; starts again after each crash."""
        for _ in range(60):
            if next(crashes, False):
                self.crash()
            step = next_step(
                self.sizes, failed=self.failed, refused=self.refused, expanded=self.expanded
            )
            if step.do is Do.NOTHING:
                return step
            self.take(step)
        raise AssertionError(f"no end: {self.sizes}")

    def kubelet(self) -> None:
        if self.sizes.status in (Status.NODE_PENDING, Status.NODE_IN_PROGRESS):
            grown = max(self.sizes.volume, self.sizes.reported)
            self.sizes = dataclasses.replace(self.sizes, reported=grown, status="")


AMOUNT = st.integers(min_value=1, max_value=9)
ANY_SIZES = st.builds(
    Sizes,
    requested=AMOUNT,
    reported=AMOUNT,
    allocated=st.none() | AMOUNT,
    status=st.sampled_from(["", "Unheard", *(status.value for status in Status)]),
    volume=AMOUNT,
)


@settings(deadline=None, max_examples=300)
@given(
    sizes=ANY_SIZES,
    asset=AMOUNT,
    limit=AMOUNT,
    extra=st.integers(0, 2),
    node_step=st.booleans(),
    crashes=st.lists(st.booleans(), max_size=20),
    later=st.lists(AMOUNT, max_size=3),
)
def test_from_any_state_it_ends_and_nothing_ever_becomes_smaller(
    sizes: Sizes,
    asset: int,
    limit: int,
    extra: int,
    node_step: bool,
    crashes: list[bool],
    later: list[int],
) -> None:
    asset = max(asset, sizes.volume)
    cluster = Cluster(sizes, asset, limit, extra, node_step)
    left = iter(crashes)
    for request in (sizes.requested, *later):
        # The API server allows a smaller request down to what the user was told.
        request = max(request, cluster.sizes.reported + (request < cluster.sizes.requested))
        cluster.sizes = dataclasses.replace(cluster.sizes, requested=request)
        for _ in range(4):
            cluster.refused = None
            cluster.run(left)
            cluster.kubelet()
        cluster.refused = None
        end = cluster.run(iter(()))
        wanted, status = cluster.sizes.requested, cluster.sizes.status
        assert cluster.sizes.reported >= wanted or status == Status.INFEASIBLE, end
        if wanted <= limit:
            assert cluster.sizes.reported >= wanted, "what can be had was not given"


# -- the patches


def conditions(patch: dict[str, Any]) -> dict[str, str]:
    listed = patch["status"]["conditions"]
    return {one["type"]: one.get("$patch") or one["message"] for one in listed}


def test_each_patch_names_the_object_and_the_version_that_were_read() -> None:
    made, its_volume = bound(), volume(resource_version="7")
    for do in (Do.MARK, Do.REFUSE, Do.FINISH, Do.AWAIT_NODE):
        patch = claim_patch(made, Step(do, GI), now=NOW)
        assert patch["metadata"] == {"uid": made.uid, "resourceVersion": "1"}
    expected = {"uid": its_volume.uid, "resourceVersion": "7"}
    assert volume_patch(its_volume, GI)["metadata"] == expected


def test_a_patch_leaves_only_the_conditions_that_hold_and_touches_no_others() -> None:
    old = (
        ClaimCondition(type="Resizing", status="True", last_transition_time=LONG_AGO),
        ClaimCondition(type="FileSystemResizePending", status="True"),
        ClaimCondition(type="ControllerResizeError", status="True", message="full"),
        ClaimCondition(type="example.com/Checked", status="True"),
    )
    made = bound(conditions=old)
    error, pending = Condition.ERROR.value, Condition.NODE_PENDING.value
    marked = claim_patch(made, Step(Do.MARK, GI), now=NOW)
    assert conditions(marked) == {"Resizing": "", error: "delete", pending: "delete"}
    assert marked["status"]["conditions"][-1]["lastTransitionTime"] == LONG_AGO
    refused = claim_patch(made, Step(Do.REFUSE, GI), now=NOW, message="too large")
    assert conditions(refused) == {"Resizing": "", error: "too large", pending: "delete"}
    finished = claim_patch(made, Step(Do.FINISH, GI), now=NOW)
    assert set(conditions(finished).values()) == {"delete"}
    assert "example.com/Checked" not in conditions(finished)


def test_sizes_are_exact_bytes() -> None:
    made = bound("1500M", "1Gi", allocated_resources={"storage": "1.5Gi"})
    read = sizes_of(made, volume(capacity="1073741825"))
    assert read == Sizes(
        requested=1_500_000_000,
        reported=GI,
        allocated=3 * GI // 2,
        status="",
        volume=GI + 1,
    )
    patch = claim_patch(made, Step(Do.MARK, 1_500_000_001), now=NOW)
    assert patch["status"]["allocatedResources"] == {"storage": "1500000001"}


def test_a_claim_without_sizes_asks_for_nothing() -> None:
    empty = PersistentVolumeClaim()
    assert next_step(sizes_of(empty, PersistentVolume())).do is Do.NOTHING
