"""One provisioner for each node: claims by their selected node, volumes by their node affinity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from external_storage import PersistentVolume, ProvisionedVolume
from external_storage.claims import selected_node, should_provision
from external_storage.kube.names import ANN_SELECTED_NODE, BINDING_WAIT, FINALIZER, LABEL_HOSTNAME
from external_storage.kube.types import (
    Node,
    NodeSelector,
    NodeSelectorRequirement,
    NodeSelectorTerm,
    VolumeNodeAffinity,
)
from external_storage.testing import builders
from external_storage.volumes import serves_node

Until = Callable[..., Any]

# -- which volumes are a node's

LABELS = {LABEL_HOSTNAME: "n1", "zone": "a", "ssd": ""}


def term(*wanted: tuple[str, str, tuple[str, ...]]) -> NodeSelectorTerm:
    """From key, operator and values of each expression."""
    expressions = [NodeSelectorRequirement(key=k, operator=o, values=v) for k, o, v in wanted]
    return NodeSelectorTerm(match_expressions=tuple(expressions))


def affinity(*terms: NodeSelectorTerm) -> VolumeNodeAffinity:
    return VolumeNodeAffinity(required=NodeSelector(node_selector_terms=terms))


def usable_on(wanted: VolumeNodeAffinity | None) -> PersistentVolume:
    volume = builders.volume()
    return msgspec.structs.replace(
        volume, spec=msgspec.structs.replace(volume.spec, node_affinity=wanted)
    )


@pytest.mark.parametrize(
    ("key", "operator", "values", "serves"),
    [
        ("zone", "In", ("a",), True),
        ("zone", "In", ("b", "a"), True),
        ("zone", "In", ("b",), False),
        ("zone", "In", (), False),
        ("missing", "In", ("a",), False),
        ("zone", "NotIn", ("b",), True),
        ("zone", "NotIn", ("b", "a"), False),
        ("missing", "NotIn", ("a",), True),
        ("ssd", "Exists", (), True),
        ("missing", "Exists", (), False),
        ("missing", "DoesNotExist", (), True),
        ("ssd", "DoesNotExist", (), False),
        ("zone", "Like", ("a",), False),
    ],
)
def test_a_nodes_labels_decide_each_operator(
    key: str, operator: str, values: tuple[str, ...], serves: bool
) -> None:
    assert serves_node(usable_on(affinity(term((key, operator, values)))), LABELS) is serves


MATCHES, OTHER = ("zone", "In", ("a",)), ("zone", "In", ("b",))


@pytest.mark.parametrize(
    ("wanted", "serves"),
    [
        (affinity(term(MATCHES, ("ssd", "Exists", ()))), True),
        (affinity(term(MATCHES, OTHER)), False),
        (affinity(term(OTHER), term(MATCHES)), True),
        (affinity(term(OTHER), term(OTHER)), False),
        (affinity(term()), False),
        (affinity(term(), term(MATCHES)), True),
        (affinity(), False),
        (VolumeNodeAffinity(), False),
        (None, False),
    ],
)
def test_one_term_must_match_as_a_whole_and_what_is_empty_matches_nothing(
    wanted: VolumeNodeAffinity | None, serves: bool
) -> None:
    assert serves_node(usable_on(wanted), LABELS) is serves


@pytest.mark.parametrize(("name", "serves"), [("n1", True), ("n2", False)])
@pytest.mark.parametrize("labelled", [False, True])
def test_a_volume_may_name_its_node_instead_of_a_label(
    name: str, serves: bool, labelled: bool
) -> None:
    by_name = NodeSelectorRequirement(key="metadata.name", operator="In", values=("n1",))
    by_label = term(MATCHES).match_expressions if labelled else ()
    one = NodeSelectorTerm(match_expressions=by_label, match_fields=(by_name,))
    assert serves_node(usable_on(affinity(one)), LABELS, name=name) is serves


@pytest.mark.parametrize("mode", ["Immediate", BINDING_WAIT])
@pytest.mark.parametrize(("node", "is_ours"), [("n1", True), ("n2", False), (None, False)])
def test_only_claims_whose_selected_node_is_ours_are_served(
    node: str | None, is_ours: bool, mode: str
) -> None:
    decision = should_provision(
        builders.claim(selected_node=node),
        builders.storage_class(binding_mode=mode),
        names=[builders.PROVISIONER],
        node_name="n1",
    )
    assert decision.proceed is is_ours


# -- two controllers


def start(rig: Any, node: str) -> Any:
    """A provisioner of the node, beside those that run."""

    def provision(request: Any) -> ProvisionedVolume:
        return ProvisionedVolume(
            source={"local": {"path": str(rig.root / request.volume_name)}},
            node_affinity=affinity(term((LABEL_HOSTNAME, "In", (node,)))),
        )

    provisioner = rig.start(declare={"node_name": node})
    provisioner.on_provision = provision
    return provisioner


def claim_on(rig: Any, name: str, storage_class: str, node: str) -> None:
    """A claim for which the scheduler has selected the node."""
    rig.claim(name, storage_class, annotations={ANN_SELECTED_NODE: node})


def test_each_provisioner_serves_its_node_and_deletes_its_own_volumes(
    rig: Any, until: Until
) -> None:
    one, two, nobody = rig.node("-1"), rig.node("-2"), rig.node("-3")
    first, second = start(rig, one), start(rig, two)
    storage_class = rig.storage_class(volumeBindingMode=BINDING_WAIT)
    claim_on(rig, "nobodys", storage_class, nobody)
    rig.claim("unscheduled", storage_class)
    rig.claim("immediate", rig.storage_class("-immediate"))
    for name, node in (("a", one), ("b", two), ("c", one)):
        claim_on(rig, name, storage_class, node)
    volumes = {name: rig.bound(name) for name in ("a", "b", "c")}
    assert sorted(first.provisioned) == ["a", "c"]
    assert second.provisioned == ["b"]
    for name in ("nobodys", "unscheduled", "immediate"):
        assert rig.get_claim(name).status.phase == "Pending"

    for name in volumes:
        rig.delete_claim(name)
    until(lambda: not rig.volumes(), "the volumes are gone")
    assert sorted(first.deleted) == sorted([volumes["a"].name, volumes["c"].name])
    assert second.deleted == [volumes["b"].name]
    assert rig.provisioner.assets() == []
    assert (len(first.provisioned), len(second.provisioned)) == (2, 1), "and nobody's claims"


def test_volumes_of_a_node_whose_provisioner_is_down_are_left_to_it(rig: Any, until: Until) -> None:
    one, two = rig.node("-1"), rig.node("-2")
    storage_class = rig.storage_class(volumeBindingMode=BINDING_WAIT)
    start(rig, one)
    claim_on(rig, "released", storage_class, one)
    claim_on(rig, "kept", storage_class, one)
    released, kept = rig.bound("released"), rig.bound("kept")
    rig.manager.stop()

    second = start(rig, two)
    rig.delete_claim("released")
    retain = {"spec": {"persistentVolumeReclaimPolicy": "Retain"}}
    rig.api.patch(PersistentVolume, kept.name, retain)
    until(
        lambda: rig.api.get(PersistentVolume, released.name).status.phase == "Released",
        "the volume is released",
    )
    # By the time its own work is done it has seen, and left alone, what came before.
    claim_on(rig, "own", storage_class, two)
    own = rig.bound("own")
    rig.delete_claim("own")
    until(lambda: own.name not in {v.name for v in rig.volumes()}, "its own volume is gone")
    assert second.deleted == [own.name]
    left = {volume.name: volume.metadata.finalizers for volume in rig.volumes()}
    assert left.keys() == {released.name, kept.name}
    assert FINALIZER in left[kept.name]

    first = start(rig, one)
    until(lambda: [v.name for v in rig.volumes()] == [kept.name], "the released volume is gone")
    assert first.deleted == [released.name]
    until(
        lambda: FINALIZER not in rig.api.get(PersistentVolume, kept.name).metadata.finalizers,
        "the kept volume needs no finalizer",
    )


def test_a_node_that_is_deleted_breaks_nothing(
    rig: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("external_storage.own_node._RETRY_S", 0.05)
    one, two = rig.node("-1"), rig.node("-2")
    storage_class = rig.storage_class(volumeBindingMode=BINDING_WAIT)
    first = start(rig, one)
    first_manager = rig.manager
    start(rig, two)
    for name in ("a", "b"):
        claim_on(rig, name, storage_class, one)
    deleted_meanwhile, deleted_later = rig.bound("a"), rig.bound("b")

    rig.drop(Node, one)
    # Nobody can run a pod there: the scheduler is to choose again.
    claim_on(rig, "late", storage_class, one)
    until(lambda: selected_node(rig.get_claim("late")) is None, "the node is taken back")
    claim_on(rig, "other", storage_class, two)
    rig.bound("other")
    rig.delete_claim("a")
    until(lambda: first.deleted == [deleted_meanwhile.name], "its volumes are deleted still")

    # Started without its Node it waits, for it cannot tell which volumes are its own.
    assert first_manager.stop()
    again = start(rig, one)
    again.on_delete = lambda _: rig.api.get(Node, one)
    rig.delete_claim("b")
    until(
        lambda: rig.api.get(PersistentVolume, deleted_later.name).status.phase == "Released",
        "the volume is released",
    )
    rig.node("-1")
    until(lambda: not [v for v in rig.volumes() if v.name == deleted_later.name], "it is deleted")
    assert again.deleted == [deleted_later.name], "not tried before the node was back"
