"""Expansion that fails or is cut off: faults, crashes, refusals and lowered requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from external_storage import (
    Expanded,
    Ignored,
    Infeasible,
    PersistentVolume,
    ProvisioningFailed,
    ProvisioningInBackground,
    StorageClass,
    VolumeInUse,
)
from external_storage.kube.errors import Invalid, NotAllowed
from external_storage.testing import FaultProxy

CLAIM_STATUS, VOLUMES = "persistentvolumeclaims/status", "persistentvolumes"
WRITES = ((CLAIM_STATUS, 0), (VOLUMES, 0), (CLAIM_STATUS, 1))
"""Those of one expansion, in their order: of which resource, and how many of it come before."""
GI = 2**30
SLOW = {"retry_interval_start": "100", "retry_interval_max": "300"}


def script(*outcomes: BaseException | None) -> Callable[[int], Expanded]:
    """One outcome for each call; the last one for all that follow."""
    left = list(outcomes)

    def play(capacity: int) -> Expanded:
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if outcome is not None:
            raise outcome
        return Expanded(capacity)

    return play


# -- faults and crashes

LOSSES = {
    "refused": lambda chosen: chosen.fail(500),
    "answered 500": lambda chosen: chosen.fail_after(500),
    "answer lost": lambda chosen: chosen.cut(),
    "conflict": lambda chosen: chosen.fail(409),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_no_lost_or_refused_write_leaves_it_half_done(
    rig: Any, growth: Any, proxy: FaultProxy, loss: str
) -> None:
    growth.start()
    for size, (resource, after) in enumerate(WRITES, start=2):
        rule = LOSSES[loss](proxy.on("patch", resource, after=after))
        growth.ask_for(f"{size}Gi")
        growth.wait_size(f"{size}Gi")
        assert rule.applied == 1
        assert set(growth.asked) == {size * GI}
        growth.asked.clear()


def test_what_others_write_meanwhile_is_kept_and_costs_no_second_call(
    rig: Any, growth: Any
) -> None:
    growth.start()
    note = {"metadata": {"annotations": {"example.com/note": "mine"}}}

    def meanwhile(capacity: int) -> Expanded:
        growth.patch(note)
        rig.api.patch(PersistentVolume, rig.bound("data").name, note)
        return Expanded(capacity)

    growth.does = meanwhile
    growth.ask_for("2Gi")
    volume = growth.wait_size("2Gi")
    assert growth.asked == [2 * GI]
    for about in (rig.get_claim("data"), volume):
        assert about.metadata.annotations["example.com/note"] == "mine"


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
def test_it_goes_on_after_a_crash_at_each_write(
    rig: Any, growth: Any, proxy: FaultProxy, written: bool
) -> None:
    """From one write on nothing succeeds, and the process ends: with or without that write."""
    growth.start(**SLOW)
    for size, (resource, after) in enumerate(WRITES, start=2):
        chosen = proxy.on("patch", resource, after=after)
        rule = chosen.fail_after(500) if written else chosen.fail(500)
        growth.ask_for(f"{size}Gi")
        growth.until(lambda rule=rule: rule.applied, "the last write before the crash")
        growth.restart(**SLOW)
        growth.wait_size(f"{size}Gi")
        assert set(growth.asked) == {size * GI}
        assert len(growth.asked) <= 2
        growth.asked.clear()


@pytest.mark.parametrize("node_step", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_it_goes_on_from_what_the_objects_say(
    rig: Any, growth: Any, recorded: bool, node_step: bool
) -> None:
    growth.start()
    rig.manager.stop()
    growth.ask_for("5Gi")
    begun = {"storage": "ControllerResizeInProgress"}
    condition = {"type": "Resizing", "status": "True"}
    fields = {"allocatedResources": {"storage": "5Gi"}, "allocatedResourceStatuses": begun}
    growth.patch_status(**fields, conditions=[condition])
    if recorded:
        size = {"spec": {"capacity": {"storage": "5Gi"}}}
        rig.api.patch(PersistentVolume, rig.bound("data").name, size)
    growth.does = lambda capacity: Expanded(capacity, node_step)
    # An expansion that was begun is ended, even if its class is gone by now.
    rig.drop(StorageClass, rig.namespace)
    rig.start()
    if node_step:
        growth.wait_status("NodeResizePending")
        assert list(growth.conditions()) == ["FileSystemResizePending"]
        assert rig.bound("data").spec.capacity == {"storage": "5Gi"}
    else:
        growth.wait_size("5Gi")
    assert growth.asked == [5 * GI]


# -- failures and lowered requests


def test_an_infeasible_request_is_told_and_a_smaller_one_is_honoured_at_once(
    rig: Any, growth: Any
) -> None:
    growth.start(**SLOW)
    growth.does = script(Infeasible("the pool has 4Gi left"))
    growth.ask_for("10Gi")
    growth.wait_status("ControllerResizeInfeasible")
    event = rig.wait_event("data", "VolumeResizeFailed")
    assert event.type == "Warning"
    assert event.message.startswith("the pool has 4Gi left. It is tried again when")
    assert growth.conditions()["ControllerResizeError"] == "the pool has 4Gi left"
    assert growth.metric("s_failed_total") == 1
    with pytest.raises(Invalid):
        growth.ask_for("1Gi")
    growth.does = Expanded
    growth.ask_for("2Gi")
    growth.wait_size("2Gi")
    assert growth.asked == [10 * GI, 2 * GI]
    assert rig.get_claim("data").status.allocated_resources == {"storage": "2Gi"}
    assert growth.conditions() == {}


def test_a_smaller_request_waits_while_the_larger_may_be_under_way(rig: Any, growth: Any) -> None:
    growth.start()
    growth.does = script(ProvisioningInBackground("copying"))
    growth.ask_for("5Gi")
    growth.until(lambda: growth.asked, "the first call")
    event = rig.wait_event("data", "Resizing")
    assert event.type == "Normal"
    growth.ask_for("2Gi")
    growth.restart()
    calls = len(growth.asked)
    growth.until(lambda: len(growth.asked) > calls + 1, "it is asked again")
    growth.does = Expanded
    growth.wait_size("5Gi")
    assert set(growth.asked) == {5 * GI}
    assert rig.events("data", "VolumeResizeFailed") == []


def test_a_smaller_request_counts_at_once_when_the_larger_is_known_to_have_failed(
    rig: Any, growth: Any
) -> None:
    growth.start(**SLOW)
    growth.does = script(OSError("no space left"), None)
    growth.ask_for("5Gi")
    assert rig.wait_event("data", "VolumeResizeFailed").message == "no space left"
    assert growth.status() == "ControllerResizeInProgress"
    growth.ask_for("2Gi")
    growth.wait_size("2Gi")
    assert growth.asked == [5 * GI, 2 * GI]


def test_after_a_restart_the_larger_request_is_tried_before_the_smaller(
    rig: Any, growth: Any
) -> None:
    growth.start()
    growth.does = script(ProvisioningFailed("no space left"))
    growth.ask_for("5Gi")
    rig.wait_event("data", "VolumeResizeFailed")
    rig.manager.stop()
    growth.ask_for("2Gi")
    growth.asked.clear()
    growth.does = script(ProvisioningFailed("no space left"), None)
    rig.start()
    growth.wait_size("2Gi")
    assert growth.asked == [5 * GI, 2 * GI]


def test_a_new_leader_does_not_rely_on_what_it_knew_of_calls_when_it_led_before(
    rig: Any, growth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("external_storage.expansion.PAUSE_S", 0.1)
    provisioner = growth.start(**SLOW)
    growth.does = script(ProvisioningFailed("no space left"))
    growth.ask_for("5Gi")
    rig.wait_event("data", "VolumeResizeFailed")
    provisioner.problem = "not yet"
    rig.controller().lead()
    growth.ask_for("2Gi")
    rig.wait_event("data", "ResizingPaused")
    growth.does = Expanded
    provisioner.problem = None
    growth.wait_size("5Gi")
    assert growth.asked == [5 * GI] * 2


def test_a_lost_lease_is_no_failure_and_no_news(
    rig: Any, growth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("external_storage.expansion.LOST_LEASE_S", 0.1)
    growth.start(**SLOW)
    growth.does = script(NotAllowed("not the leader any more"), None)
    growth.ask_for("2Gi")
    growth.wait_size("2Gi")
    assert growth.metric("s_failed_total") == 0
    assert rig.events("data", "VolumeResizeFailed") == []


def fails_at(size: int, error: BaseException) -> Callable[[int], Expanded]:
    """Every call for this size fails; other claims are served."""

    def play(capacity: int) -> Expanded:
        if capacity == size:
            raise error
        return Expanded(capacity)

    return play


def test_what_is_infeasible_is_not_tried_again_soon(rig: Any, growth: Any) -> None:
    growth.start(retry_interval_start="0.01", retry_interval_max="300")
    growth.does = fails_at(2 * GI, Infeasible("full"))
    growth.ask_for("2Gi")
    rig.wait_event("data", "VolumeResizeFailed")
    growth.patch({"metadata": {"labels": {"touched": "yes"}}})
    growth.grow_other()
    assert growth.asked.count(2 * GI) == 1


def test_what_is_infeasible_is_tried_again_in_the_end(rig: Any, growth: Any) -> None:
    growth.start(retry_interval_max="0.5")
    growth.does = script(Infeasible("full"), None)
    growth.ask_for("2Gi")
    growth.wait_size("2Gi")
    assert growth.asked == [2 * GI] * 2
    assert growth.conditions() == {}


def test_a_back_end_that_gives_less_than_it_was_asked_for_has_failed(rig: Any, growth: Any) -> None:
    growth.start(**SLOW)
    growth.does = lambda capacity: Expanded(capacity - 1)
    growth.ask_for("2Gi")
    told = rig.wait_event("data", "VolumeResizeFailed").message
    assert told == f"expand gave {2 * GI - 1} bytes, {2 * GI} were asked for"
    assert rig.bound("data").spec.capacity == {"storage": "1Gi"}
    assert rig.get_claim("data").status.capacity == {"storage": "1Gi"}


def test_a_volume_in_use_is_waited_for_quietly(rig: Any, growth: Any) -> None:
    growth.start()
    growth.does = script(VolumeInUse("mounted on node-1"), None)
    growth.ask_for("2Gi")
    growth.wait_size("2Gi")
    assert rig.wait_event("data", "VolumeInUse").type == "Normal"
    assert rig.events("data", "VolumeResizeFailed") == []
    assert growth.metric("s_failed_total") == 0


def test_an_ignored_expansion_is_left_alone_without_an_event(rig: Any, growth: Any) -> None:
    growth.start()
    growth.does = fails_at(2 * GI, Ignored("another array's"))
    growth.ask_for("2Gi")
    growth.until(lambda: growth.asked, "the call")
    growth.grow_other()
    assert growth.asked.count(2 * GI) == 1
    assert rig.events("data", "VolumeResizeFailed") == []


def test_a_node_that_failed_gets_another_try_but_not_at_once_again(rig: Any, growth: Any) -> None:
    growth.start(**SLOW)
    growth.does = lambda capacity: Expanded(capacity, node_step=True)
    growth.ask_for("2Gi")
    growth.wait_status("NodeResizePending")
    failed = {"allocatedResourceStatuses": {"storage": "NodeResizeInfeasible"}}
    growth.patch_status(**failed)
    growth.wait_status("NodeResizePending")
    growth.patch_status(**failed)
    growth.grow_other()
    assert growth.asked == [2 * GI, 2 * GI, 7 * GI]
    assert growth.status() == "NodeResizeInfeasible"
    growth.ask_for("3Gi")
    growth.wait_status("NodeResizePending")
    assert growth.asked == [2 * GI, 2 * GI, 7 * GI, 2 * GI]
