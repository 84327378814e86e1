"""What is left, as the objects that tell the scheduler."""

from __future__ import annotations

from typing import Any

import pytest

from external_storage import AvailableCapacity, Seconds, Settings
from external_storage.capacity import can_have_driver, capacity_objects, managed_by
from external_storage.fields import Problems
from external_storage.testing import builders

GIB = 2**30


def left(gib: int, **topology: str) -> AvailableCapacity:
    return AvailableCapacity(capacity=gib * GIB, topology=topology)


def names(instance: str = "", **fields: Any) -> set[str]:
    made_of = builders.storage_class(**fields)
    return set(capacity_objects(made_of, [left(1, zone="a")], instance=instance))


def test_names_are_always_the_same_and_differ_by_provisioner_class_and_instance() -> None:
    assert names() == names()
    assert len(names() | names(name="other") | names(provisioner="b") | names("n1")) == 4


def test_each_topology_is_an_object_and_so_is_each_pool_of_it() -> None:
    entries = [left(1, zone="a", rack="1"), left(2, rack="1", zone="a"), left(3), left(4, zone="b")]
    objects = capacity_objects(builders.storage_class(), entries, instance="")
    assert [o["capacity"] for o in objects.values()] == ["1Gi", "2Gi", "3Gi", "4Gi"]
    # Empty, which is every node; none at all would be no node.
    assert [o["nodeTopology"] for o in objects.values()][2] == {"matchLabels": {}}
    longer = capacity_objects(builders.storage_class(), entries[:1], instance="")
    assert longer.keys() < objects.keys()


@pytest.mark.parametrize(("largest", "told"), [(None, None), (2 * GIB, "2Gi"), (9 * GIB, "5Gi")])
def test_the_largest_volume_is_never_told_above_what_is_left(
    largest: int | None, told: str | None
) -> None:
    entry = AvailableCapacity(capacity=5 * GIB, maximum_volume_size=largest)
    objects = capacity_objects(builders.storage_class(), [entry], instance="")
    assert [o["maximumVolumeSize"] for o in objects.values()] == [told]


@pytest.mark.parametrize("instance", ["", "node-1", "node." * 50 + "x", "Ünfit/", "-"])
def test_any_instance_makes_a_valid_label_of_its_own(instance: str) -> None:
    label = managed_by(instance)
    assert len(label) <= 63
    assert all(c.isascii() and (c.isalnum() or c in "-.") for c in label)
    assert label[-1].isalnum()
    assert label != managed_by(instance + "x")


@pytest.mark.parametrize(
    ("name", "can"),
    [("local.example.com", True), ("x", True), ("example.com/nfs", False), ("a" * 64, False)],
)
def test_a_name_with_a_slash_cannot_be_a_drivers(name: str, can: bool) -> None:
    assert can_have_driver(name) is can


def test_the_poll_interval_is_a_second_at_least() -> None:
    assert Settings(provisioner_name="x").capacity_poll_interval == Seconds(60.0)
    with pytest.raises(Problems, match="--capacity-poll-interval: must be at least 1 s"):
        Settings.from_texts({"provisioner_name": "x", "capacity_poll_interval": "0.5"})
