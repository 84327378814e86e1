"""Who logs in from which node: read from Nodes, where the node-agent or an admin wrote it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from external_storage import Change, EventRecorder, Informer, get_logger
from external_storage.kube.client import Client
from external_storage.kube.types import Node
from iscsi_targetd_provisioner.names import iqn_problem

log = get_logger(__name__)

ANNOTATION = "iscsi.external-storage.dev/initiator"
"""On a Node: the InitiatorName of its open-iscsi. No label, which cannot hold a colon."""


class NodeInitiators:
    """The initiators of all nodes that say theirs, current as of the last watch event."""

    def __init__(
        self, client: Client, events: EventRecorder, *, on_change: Callable[[], None]
    ) -> None:
        self._events = events
        self._on_change = on_change
        self._told: set[tuple[str, str]] = set()
        self.refused: frozenset[str] = frozenset()
        """Names that a storage host has not taken."""
        self._informer = Informer(client, Node)
        self._informer.add_handler(self._changed)

    def start(self) -> None:
        self._informer.start()

    def stop(self) -> None:
        self._informer.stop()

    def wait_known(self, timeout_s: float) -> bool:
        """Whether all nodes have been seen once."""
        return self._informer.wait_synced(timeout_s)

    def names(self) -> frozenset[str]:
        """Good ones, in lower case, which is how both sides compare them."""
        return frozenset(_by_name(self._informer.lister.all()))

    def note_refused(self, names: frozenset[str]) -> None:
        """A storage host does not take these; told by the next ``report``."""
        self.refused |= names

    def report(self) -> int:
        """Tell the nodes that have a bad name, or one that is another node's too; how many."""
        # One look: a node may come or go between two.
        nodes = {node.name: node for node in self._informer.lister.all()}
        bad: set[tuple[str, str]] = set()
        for name, owners in _by_name(nodes.values()).items():
            if len(owners) > 1:
                text = (
                    f"Initiator name {name} is that of several nodes ({', '.join(owners)}): they "
                    "would write to one volume as if they were one. Give each its own in "
                    "/etc/iscsi/initiatorname.iscsi"
                )
                bad |= {(owner, text) for owner in owners}
            if name in self.refused:
                text = f"Initiator name {name} is not taken by a storage host: no volume for it"
                bad |= {(owner, text) for owner in owners}
        for node in nodes.values():
            found = node.metadata.annotations.get(ANNOTATION, "").strip()
            problem = iqn_problem(found.lower()) if found else None
            if problem is not None:
                bad.add((node.name, f"Annotation {ANNOTATION}: {problem}"))
        for name, text in sorted(bad - self._told):
            log.warning("a node's initiator cannot be trusted", node=name, reason=text)
            self._events.warning(nodes[name], "BadInitiator", text)
        self._told = bad
        return len({name for name, _ in bad})

    def _changed(self, change: Change[Node]) -> None:
        before = initiator_of(change.old) if change.old is not None else ""
        after = initiator_of(change.new) if change.new is not None else ""
        if before != after:
            self._on_change()


def _by_name(nodes: Iterable[Node]) -> dict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for node in nodes:
        name = initiator_of(node)
        if name:
            found[name].append(node.name)
    return {name: sorted(owners) for name, owners in found.items()}


def initiator_of(node: Node) -> str:
    """The node's initiator; empty if it has none that can be used."""
    name = node.metadata.annotations.get(ANNOTATION, "").strip().lower()
    return name if name and iqn_problem(name) is None else ""
