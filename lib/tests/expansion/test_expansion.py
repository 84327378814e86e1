"""Expansion on the real control plane: to its end, and what is not to be grown."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from external_storage import Expanded, PersistentVolume, ProvisionedVolume, StorageClass
from external_storage.kube.errors import NotFound
from external_storage.kube.types import Event

CLAIM_STATUS, VOLUMES = "persistentvolumeclaims/status", "persistentvolumes"
GI = 2**30
LIMIT_S = 60.0


# -- to its end


def test_a_claim_that_asks_for_more_gets_it_step_by_step(rig: Any, growth: Any) -> None:
    growth.start()
    growth.patch_status(conditions=[{"type": "example.com/Checked", "status": "True"}])
    seen: list[Any] = []

    def look(capacity: int) -> Expanded:
        seen.extend((rig.get_claim("data"), growth.conditions(), rig.volumes()[0]))
        return Expanded(capacity)

    growth.does = look
    before = len(growth.requests())
    growth.ask_for("5Gi")
    volume = growth.wait_size("5Gi")
    assert growth.asked == [5 * GI]
    assert growth.volumes[0].uid == volume.uid
    during, shown, not_yet = seen
    assert during.status.allocated_resources == {"storage": "5Gi"}
    assert during.status.allocated_resource_statuses == {"storage": "ControllerResizeInProgress"}
    assert during.status.capacity == {"storage": "1Gi"}
    assert "Resizing" in shown
    assert not_yet.spec.capacity == {"storage": "1Gi"}
    after = rig.get_claim("data").status
    assert after.allocated_resources == {"storage": "5Gi"}
    assert list(growth.conditions()) == ["example.com/Checked"]
    grown, done = (rig.wait_event("data", r) for r in ("Resizing", "VolumeResizeSuccessful"))
    assert grown.message == f"Volume {volume.name} is being grown to 5Gi"
    assert done.message == f"Volume {volume.name} has 5Gi"
    writes = [("patch", CLAIM_STATUS), ("patch", VOLUMES), ("patch", CLAIM_STATUS)]
    reads = [("get", "persistentvolumeclaims"), ("get", VOLUMES)]
    assert [one for one in growth.requests()[before:] if one[0] == "patch"] == writes
    # These are the rights that the manifests must give.
    assert set(growth.requests()[before:]) == {*reads, *writes}
    assert (growth.metric("s_total"), growth.metric("s_failed_total")) == (1, 0)
    assert growth.metric("_duration_seconds_count") == 1


def test_the_external_expanding_event_of_the_controller_manager_changes_nothing(
    rig: Any, growth: Any
) -> None:
    growth.start()
    growth.ask_for("2Gi")

    def told() -> list[Event]:
        events = rig.api.list_all(Event, namespace=rig.namespace)
        return [event for event in events if event.reason == "ExternalExpanding"]

    event = growth.until(told, "the controller manager leaves it to us")[0]
    assert (event.involved_object.name, event.source.component) == ("data", "volume_expand")
    growth.wait_size("2Gi")
    assert growth.asked == [2 * GI]


def test_the_node_does_its_part_and_we_leave_it_alone_meanwhile(rig: Any, growth: Any) -> None:
    growth.start()
    growth.does = lambda capacity: Expanded(capacity, node_step=True)
    growth.ask_for("2Gi")
    growth.wait_status("NodeResizePending")
    assert list(growth.conditions()) == ["FileSystemResizePending"]
    assert rig.get_claim("data").status.capacity == {"storage": "1Gi"}
    assert rig.bound("data").spec.capacity == {"storage": "2Gi"}
    rig.wait_event("data", "FileSystemResizeRequired")
    # A request that grows again waits until the kubelet is through.
    growth.ask_for("3Gi")
    growth.patch_status(allocatedResourceStatuses={"storage": "NodeResizeInProgress"})
    growth.grow_other()
    assert growth.asked == [2 * GI, 7 * GI]
    growth.finish_on_node("2Gi")
    growth.until(lambda: growth.status() == "NodeResizePending", "the second step")
    assert growth.asked == [2 * GI, 7 * GI, 3 * GI]
    growth.finish_on_node("3Gi")
    growth.wait_size("3Gi")


def test_sizes_are_exact_and_a_back_end_may_give_more(rig: Any, growth: Any) -> None:
    growth.start()
    growth.does = lambda capacity: Expanded(-(-capacity // GI) * GI)
    growth.ask_for("1500M")
    growth.wait_size("2Gi")
    assert growth.asked == [1_500_000_000]
    assert rig.get_claim("data").status.allocated_resources == {"storage": "1500M"}
    # What is there already is not asked for.
    growth.ask_for("2Gi")
    growth.ask_for("2147483649")
    growth.wait_size("3Gi")
    assert growth.asked == [1_500_000_000, 2 * GI + 1]


def test_a_volume_that_was_made_larger_has_room_to_grow_into(rig: Any, growth: Any) -> None:
    provisioner = rig.start()
    source = {"hostPath": {"path": str(rig.root)}}
    provisioner.on_provision = lambda _: ProvisionedVolume(source=source, capacity=4 * GI)
    rig.claim("data", rig.storage_class(allowVolumeExpansion=True))
    rig.bound("data")
    growth.ask_for("3Gi")
    growth.ask_for("5Gi")
    growth.wait_size("5Gi")
    assert growth.asked == [5 * GI]


def test_two_fast_increases_are_two_calls_one_after_the_other(rig: Any, growth: Any) -> None:
    growth.start()
    entered = growth.hold()
    growth.ask_for("2Gi")
    assert entered.wait(LIMIT_S)
    growth.ask_for("3Gi")
    growth.ask_for("4Gi")
    growth.release.set()
    growth.wait_size("4Gi")
    assert growth.asked == [2 * GI, 4 * GI]


# -- not to be grown


def test_a_provisioner_without_expand_says_so_once_and_writes_nothing(
    rig: Any, growth: Any
) -> None:
    del rig.methods["expand"]
    growth.start()
    storage_class = rig.namespace
    growth.ask_for("2Gi")
    event = rig.wait_event("data", "VolumeResizeFailed")
    assert event.type == "Warning"
    assert f"{rig.name} cannot expand volumes" in event.message
    assert f"Set allowVolumeExpansion to false on class {storage_class}" in event.message
    growth.patch({"metadata": {"labels": {"touched": "yes"}}})
    growth.ask_for("3Gi")
    rig.claim("later", storage_class)
    rig.bound("later")
    growth.ask_for("2Gi", "later")
    rig.wait_event("later", "VolumeResizeFailed")
    rig.manager.stop()
    assert [event.count for event in rig.events("data", "VolumeResizeFailed")] == [1]
    assert not [request for request in growth.requests() if request[0] == "patch"]


def test_only_bound_volumes_of_ours_whose_claim_asks_for_more_are_grown(
    rig: Any, growth: Any
) -> None:
    rig.start()
    storage_class = rig.storage_class(allowVolumeExpansion=True)
    names = ("content", "foreign", "terminating", "zzz")
    for name in names:
        rig.claim(name, storage_class)
    volumes = {name: rig.bound(name) for name in names}
    # One worker, so that claims are looked at in the order of their names.
    rig.manager.stop()
    other = {"metadata": {"annotations": {"pv.kubernetes.io/provisioned-by": "example.com/other"}}}
    rig.api.patch(PersistentVolume, volumes["foreign"].name, other)
    growth.patch({"metadata": {"finalizers": ["example.com/held"]}}, "terminating")
    for name in names[1:]:
        growth.ask_for("2Gi", name)
    rig.delete_claim("terminating")
    rig.claim("unbound", "no-such-class")
    try:
        rig.start(worker_threads="1")
        growth.wait_size("2Gi", "zzz")
        assert [volume.name for volume in growth.volumes] == [volumes["zzz"].name]
        for name in names[:-1]:
            assert growth.status(name) == ""
    finally:
        growth.patch({"metadata": {"finalizers": None}}, "terminating")
        mine = {"metadata": {"annotations": {"pv.kubernetes.io/provisioned-by": rig.name}}}
        rig.api.patch(PersistentVolume, volumes["foreign"].name, mine)


def test_another_instances_volume_is_left_to_it(rig: Any, growth: Any) -> None:
    mine: list[str] = []
    rig.methods["may_delete"] = lambda _, volume: not mine or volume.name in mine
    growth.start()
    rig.claim("theirs", rig.namespace)
    rig.bound("theirs")
    mine.append(rig.bound("data").name)
    growth.ask_for("2Gi", "theirs")
    growth.ask_for("2Gi")
    volume = growth.wait_size("2Gi")
    assert [asked.name for asked in growth.volumes] == [volume.name]
    mine.clear()


def test_a_paused_provisioner_says_why_once_and_goes_on_by_itself(
    rig: Any, growth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("external_storage.expansion.PAUSE_S", 0.1)
    provisioner = growth.start(retry_interval_max="0.2")
    looks = itertools.count()
    provisioner.problem = "the pool is being checked"
    growth.ask_for("2Gi")
    assert rig.wait_event("data", "ResizingPaused").message == "Waiting: the pool is being checked"
    provisioner.check = lambda: (next(looks) < 3 and "the pool is being checked") or None
    growth.wait_size("2Gi")
    # A class that allows it no longer is waited for as well.
    provisioner.check = lambda: "one more check"
    growth.ask_for("3Gi")
    growth.until(lambda: len(rig.events("data", "ResizingPaused")) == 2, "the second reason")
    rig.api.patch(StorageClass, rig.namespace, {"allowVolumeExpansion": False})
    growth.until(lambda: len(rig.events("data", "ResizingPaused")) == 3, "the third reason")
    del provisioner.check
    provisioner.problem = None
    rig.api.patch(StorageClass, rig.namespace, {"allowVolumeExpansion": True})
    growth.wait_size("3Gi")
    rig.manager.stop()
    events = rig.events("data", "ResizingPaused")
    assert [event.count for event in events] == [1, 1, 1]
    assert {event.message for event in events} == {
        "Waiting: the pool is being checked",
        "Waiting: one more check",
        f"Waiting: class {rig.namespace} does not allow expansion any more",
    }
    assert growth.asked == [2 * GI, 3 * GI]


def test_a_volume_is_not_deleted_while_it_is_being_expanded(rig: Any, growth: Any) -> None:
    provisioner = growth.start()
    volume = rig.bound("data")
    entered = growth.hold()
    growth.ask_for("2Gi")
    assert entered.wait(LIMIT_S)
    rig.delete_claim("data")
    told = rig.wait_event(volume.name, "VolumeInUse")
    assert told.message == "an expansion of the volume is going on"
    assert provisioner.deleted == []
    growth.release.set()

    def gone() -> bool:
        try:
            rig.api.get(PersistentVolume, volume.name)
        except NotFound:
            return True
        return False

    growth.until(gone, "the volume is deleted")
    assert provisioner.deleted == [volume.name]
    assert growth.asked == [2 * GI]
    assert rig.events("data", "VolumeResizeFailed") == []
