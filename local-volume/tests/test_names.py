"""Names and sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_volume_provisioner.names import (
    compatible_name,
    is_provisioned_here,
    node_label,
    provisioner_name,
    rounded,
    safe_name,
)

UID = "0c5d8d4a-7b0e-4c58-9b1c-111111111111"
GIB = 1 << 30


@pytest.mark.parametrize(
    ("entry", "class_name", "digest"),
    [
        ("mount1", "sc1", "aaaafef5"),
        ("mount2", "sc1", "79412c38"),
        ("mount1", "sc2", "a7aafa3c"),
        ("symlink2", "sc1", "23645a36"),
        ("symlink1", "sc2", "55d5adba"),
        ("symlink2", "sc2", "226458a3"),
    ],
)
def test_names_are_the_references(entry: str, class_name: str, digest: str) -> None:
    assert compatible_name(entry, "test-node", class_name) == f"local-pv-{digest}"


def test_safe_names_keep_apart_what_the_reference_mixes_up() -> None:
    assert compatible_name("disk1", "1a", "c") == compatible_name("disk11", "a", "c")
    assert safe_name("disk1", "1a", "c") != safe_name("disk11", "a", "c")
    assert safe_name("disk1", "a", "c").startswith("local-pv-disk1-")


@given(st.text(min_size=1, max_size=80), st.text(max_size=80))
def test_safe_names_are_names_whatever_the_entry_is_called(entry: str, node: str) -> None:
    name = safe_name(entry, node, "c")
    assert len(name) <= 100
    assert all(c.isdigit() or "a" <= c <= "z" or c == "-" for c in name)
    assert name[-1] != "-"


@pytest.mark.parametrize(
    ("size", "capacity"),
    [
        (10 * GIB + 5, 10 * GIB),
        (10 * GIB - 1, 10 * GIB - (1 << 20)),
        ((10 << 20) + 1, 10 << 20),
        ((10 << 20) - 1, (10 << 20) - 1),
        (0, 0),
    ],
)
def test_sizes_are_rounded_as_the_reference_rounds(size: int, capacity: int) -> None:
    assert rounded(size) == capacity


def test_volumes_of_an_earlier_node_object_are_ours() -> None:
    assert is_provisioned_here(provisioner_name("n", UID, name_only=False), "n")
    assert is_provisioned_here(provisioner_name("n", UID, name_only=True), "n")
    assert not is_provisioned_here(provisioner_name("n-2", UID, name_only=False), "n")
    assert not is_provisioned_here(provisioner_name("n", "x", name_only=False), "n")


def test_long_node_names_make_labels() -> None:
    long = "node." + "x" * 100
    assert len(node_label(long)) <= 63
    assert node_label(long) != node_label(f"{long}y")
    assert node_label("short") == "short"
