"""What is left, published round by round to a real API server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from external_storage import AvailableCapacity, Seconds, StorageClass
from external_storage.capacity import LABEL_MANAGED_BY
from external_storage.controller import ProvisionController
from external_storage.informer import Change
from external_storage.kube.names import BINDING_WAIT
from external_storage.kube.types import CSIDriver, CSIStorageCapacity, Node
from external_storage.testing import builders

GIB = 2**30
CAPACITIES = "csistoragecapacities"
Until = Callable[..., Any]
Warned = Callable[[], list[str]]
Left = list[AvailableCapacity] | None


def left(gib: int, **topology: str) -> AvailableCapacity:
    return AvailableCapacity(capacity=gib * GIB, topology=topology)


def test_classes_that_wait_are_published_and_only_changes_are_written(bed: Any) -> None:
    bed.driver()
    bed.add_class("wait")
    bed.add_class("immediate", "Immediate")
    bed.classes.apply(builders.storage_class(name="foreign", binding_mode=BINDING_WAIT))
    publisher, pools = bed.publisher()
    pools.ask = lambda _: [left(1, zone="a"), replace(left(2), maximum_volume_size=GIB)]
    assert publisher.publish()
    before = bed.objects()
    assert [item.storage_class_name for item in before] == ["wait", "wait"]
    assert [item.capacity for item in before] == ["1Gi", "2Gi"]
    assert [item.maximum_volume_size for item in before] == [None, "1Gi"]
    assert [t and t.match_labels for t in (i.node_topology for i in before)] == [{"zone": "a"}, {}]
    assert before[0].metadata.labels == {
        "external-storage.dev/provisioner": bed.rig.name,
        "external-storage.dev/managed-by": "external-storage",
    }

    assert bed.written == ["create", "create"]

    assert publisher.publish()
    assert bed.objects() == before

    pools.ask = lambda _: [left(1, zone="a"), left(7)]
    assert publisher.publish()
    after = bed.objects()
    assert after[0] == before[0]
    assert (after[1].uid, after[1].capacity) == (before[1].uid, "7Gi")
    assert after[1].maximum_volume_size is None
    assert bed.written == ["create", "create", "patch"]


def test_what_is_no_longer_reported_is_removed(bed: Any) -> None:
    bed.driver()
    bed.add_class("kept")
    gone = bed.add_class("gone")
    unknown = bed.add_class("unknown")
    publisher, pools = bed.publisher()
    pools.ask = lambda _: [left(1), left(2, zone="a")]
    publisher.publish()
    assert len(bed.objects()) == 6
    pools.ask = lambda asked: None if asked.name == unknown.name else [left(1)]
    bed.classes.apply(gone, deleted=True)
    publisher.publish()
    assert bed.told() == [("kept", "1Gi")]
    driver = {"spec": {"storageCapacity": False}}
    bed.rig.api.patch(CSIDriver, bed.rig.name, driver)
    publisher.publish()
    assert bed.objects() == []


def test_without_a_driver_nothing_is_asked_or_published(bed: Any) -> None:
    bed.add_class("wait")
    publisher, pools = bed.publisher()
    asked: list[str] = []
    pools.ask = lambda storage_class: asked.append(storage_class.name)
    assert publisher.publish()
    assert (asked, bed.objects()) == ([], [])


def test_replicas_share_their_objects_and_only_the_leader_writes(bed: Any) -> None:
    bed.driver()
    bed.add_class("wait")
    leads = [True, False]
    one, pools_of_one = bed.publisher(is_leader=lambda: leads[0])
    two, pools_of_two = bed.publisher(is_leader=lambda: leads[1])
    pools_of_one.ask = lambda _: [left(1)]
    asked: list[str] = []

    def ask_two(storage_class: StorageClass) -> Left:
        asked.append(storage_class.name)
        return [left(2)]

    pools_of_two.ask = ask_two
    assert one.publish()
    assert two.publish()
    assert asked == [], "who only waits for the lead does not trouble the back end"
    before = bed.objects()
    assert bed.told() == [("wait", "1Gi")]
    leads.reverse()
    assert one.publish()
    assert two.publish()
    assert bed.told() == [("wait", "2Gi")]
    assert bed.objects()[0].uid == before[0].uid


def test_a_replica_publishes_as_soon_as_it_leads(bed: Any, until: Until) -> None:
    rig = bed.rig
    bed.driver()
    rig.storage_class(volumeBindingMode=BINDING_WAIT)
    pools = bed.pools(bed.client, capacity_poll_interval=Seconds(3600.0))
    looks: list[bool] = []
    leads = [False]

    def is_leader() -> bool:
        if threading.current_thread().name == "capacity":
            looks.append(leads[0])
        return leads[0]

    controller = ProvisionController(
        bed.client,
        pools,
        pools.settings,
        events=pools.context.events,
        metrics=pools.context.metrics,
        is_leader=is_leader,
    )
    controller.start()
    try:
        until(lambda: len(looks) == 2, "a round without the lead is over")
        leads[0] = True
        controller.lead()
        until(bed.objects, "it publishes")
    finally:
        assert controller.stop()


def test_a_round_that_loses_the_lead_writes_nothing_more(bed: Any, warnings: Warned) -> None:
    bed.driver()
    bed.add_class("wait")
    leads = [True]
    publisher, pools = bed.publisher(is_leader=lambda: leads[0])

    def ask(_: StorageClass) -> Left:
        leads[0] = False
        return [left(1)]

    pools.ask = ask
    assert publisher.publish()
    assert bed.objects() == []
    assert warnings() == []


def test_instances_with_assets_of_their_own_do_not_touch_each_others_objects(bed: Any) -> None:
    bed.driver()
    bed.add_class("wait")
    publishers = []
    for number, identity in enumerate(("one", "two"), start=1):
        publisher, pools = bed.publisher(is_leader=lambda: False)
        pools.owns_assets, pools.identity = True, identity
        pools.ask = lambda _, number=number: [left(number)]
        publishers.append((publisher, pools))
        assert publisher.publish()
    assert bed.told() == [("wait", "1Gi"), ("wait", "2Gi")]
    publisher, pools = publishers[0]
    pools.ask = lambda _: []
    assert publisher.publish()
    assert bed.told() == [("wait", "2Gi")]
    assert bed.objects()[0].metadata.labels[LABEL_MANAGED_BY] == "external-storage-two"


def test_the_objects_of_a_node_go_with_the_node(bed: Any, until: Until) -> None:
    bed.driver()
    bed.add_class("wait")
    publisher, pools = bed.publisher()
    pools.node_name = bed.rig.node()
    assert publisher.publish()
    before = bed.objects()
    assert [owner.kind for owner in before[0].metadata.owner_references] == ["Node"]
    # Nobody publishes at this moment: the garbage collector does it.
    bed.rig.drop(Node, pools.node_name)
    until(lambda: not bed.objects(), "the objects of a node that is gone are removed")
    assert publisher.publish()
    assert bed.objects() == []
    bed.rig.node()
    assert publisher.publish()
    after = bed.objects()
    assert after[0].name == before[0].name
    assert after[0].metadata.owner_references != before[0].metadata.owner_references


def test_what_others_did_to_our_objects_is_repaired(bed: Any) -> None:
    bed.driver()
    bed.add_class("wait")
    publisher, pools = bed.publisher()
    pools.ask = lambda _: [left(1), left(2, zone="a"), left(3, zone="b")]
    publisher.publish()
    before = bed.objects()
    api, namespace = bed.rig.api, bed.rig.namespace
    edited, unlabelled, deleted = before
    api.patch(CSIStorageCapacity, edited.name, {"capacity": "9Ti"}, namespace=namespace)
    labels = {"metadata": {"labels": {LABEL_MANAGED_BY: None}}}
    api.patch(CSIStorageCapacity, unlabelled.name, labels, namespace=namespace)
    api.delete(CSIStorageCapacity, deleted.name, uid=deleted.uid, namespace=namespace)
    assert publisher.publish()
    after = bed.objects()
    assert [item.capacity for item in after] == ["1Gi", "2Gi", "3Gi"]
    assert [item.metadata.labels for item in after] == [item.metadata.labels for item in before]


def test_volumes_of_ours_that_come_go_or_grow_are_a_reason_to_look(bed: Any) -> None:
    publisher, _ = bed.publisher(is_mine=lambda volume: volume.name != "foreign")
    small, large = builders.volume(name="v"), builders.volume(name="v", capacity="2Gi")
    touched = builders.volume(name="v", resource_version="2")
    foreign = builders.volume(name="foreign")
    for old, new, wakes in (
        (None, small, True),
        (small, large, True),
        (small, None, True),
        (small, touched, False),
        (None, foreign, False),
    ):
        publisher._wanted.clear()
        publisher.on_volume(Change(old, new))
        assert publisher._wanted.is_set() is wakes
