"""What nodes say of themselves, and what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.backend_suite import ONE, TWO

from external_storage.kube.types import Node, ObjectMeta
from iscsi_targetd_provisioner.initiators import ANNOTATION, NodeInitiators


class Events(list[tuple[str, str, str]]):
    def warning(self, about: Any, reason: str, text: str) -> None:
        self.append((about.name, reason, text))

    normal = warning


def node(name: str, initiator: str) -> Node:
    return Node(metadata=ObjectMeta(name=name, annotations={ANNOTATION: initiator}))


@pytest.fixture
def initiators() -> tuple[NodeInitiators, Events, list[list[Node]]]:
    """One that sees these nodes, at each look the next; the last for ever."""
    events = Events()
    made = NodeInitiators(cast(Any, None), cast(Any, events), on_change=lambda: None)
    looks: list[list[Node]] = []

    def all_nodes() -> Sequence[Node]:
        return looks.pop(0) if len(looks) > 1 else looks[0]

    made._informer = cast(Any, SimpleNamespace(lister=SimpleNamespace(all=all_nodes)))
    return made, events, looks


def test_a_node_that_comes_amid_a_report_does_not_end_it(
    initiators: tuple[NodeInitiators, Events, list[list[Node]]],
) -> None:
    nodes, events, looks = initiators
    looks[:] = [[node("a", ONE)], [node("a", ONE), node("b", ONE)]]
    assert nodes.report() == 0
    assert nodes.report() == 2
    assert {name for name, _, _ in events} == {"a", "b"}


def test_a_name_that_is_another_nodes_or_malformed_or_refused_is_told_once(
    initiators: tuple[NodeInitiators, Events, list[list[Node]]],
) -> None:
    nodes, events, looks = initiators
    looks[:] = [
        [node("a", ONE), node("b", ONE.upper()), node("c", "iqn.2026-01.com"), node("d", TWO)]
    ]
    for _ in range(2):
        assert nodes.report() == 3
    assert [(name, reason) for name, reason, _ in events] == [
        ("a", "BadInitiator"),
        ("b", "BadInitiator"),
        ("c", "BadInitiator"),
    ]
    assert nodes.names() == {ONE, TWO}
    nodes.note_refused(frozenset({TWO}))
    assert nodes.report() == 4
    assert events[-1][0] == "d"
    assert "is not taken by a storage host" in events[-1][2]
