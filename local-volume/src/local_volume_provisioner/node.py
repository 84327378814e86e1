"""The node that the agent runs on, as the API server knows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from external_storage import get_logger
from external_storage.kube.client import Client
from external_storage.kube.errors import Forbidden, KubeError, NotFound
from external_storage.kube.names import LABEL_HOSTNAME
from external_storage.kube.request import JSON_PATCH
from external_storage.kube.types import KubeObject, KubeStruct

log = get_logger(__name__)


class Taint(KubeStruct, frozen=True):
    key: str = ""


class NodeSpec(KubeStruct, frozen=True):
    taints: tuple[Taint, ...] = ()


class Node(KubeObject, frozen=True):
    """With the taints, which the library's own type has not."""

    API_VERSION = "v1"
    KIND = "Node"
    RESOURCE = "nodes"

    spec: NodeSpec = NodeSpec()


class Namespace(KubeObject, frozen=True):
    """Of which only the UID is looked at."""

    API_VERSION = "v1"
    KIND = "Namespace"
    RESOURCE = "namespaces"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What goes into volumes."""

    node: Node
    cluster: str = ""
    """As ``cluster`` says."""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def uid(self) -> str:
        return self.node.uid

    @property
    def hostname(self) -> str:
        """The value of the hostname label, which node affinity goes by; empty without one."""
        return self.labels.get(LABEL_HOSTNAME, "")


def read(client: Client, name: str) -> NodeFacts:
    """Live; raises KubeError."""
    node = client.get(Node, name)
    return NodeFacts(node=node, cluster=cluster(client), labels=node.metadata.labels)


def cluster(client: Client) -> str:
    """What tells this cluster from one that the machine has been in before; empty if we have no
    right to read it. Raises KubeError."""
    try:
        return client.get(Namespace, "kube-system").uid
    except (Forbidden, NotFound) as error:
        log.warning("it cannot be read which cluster this is", error=str(error))
        return ""


def remove_taint(client: Client, name: str, key: str) -> str | None:
    """Remove the taint of that key; None when it is gone, else why not.

    Needs a right that the manifests give only in ``deploy/taint``.
    """
    try:
        taints = client.get(Node, name).spec.taints
        for index in [i for i, taint in enumerate(taints) if taint.key == key][:1]:
            # The test: somebody else may have changed the list since we read it.
            patch: list[dict[str, Any]] = [
                {"op": "test", "path": f"/spec/taints/{index}/key", "value": key},
                {"op": "remove", "path": f"/spec/taints/{index}"},
            ]
            client.patch(Node, name, patch, content_type=JSON_PATCH)
            log.info("taint removed", node=name, taint=key)
        left = client.get(Node, name).spec.taints
    except KubeError as error:
        return str(error)
    return "it is there again" if any(taint.key == key for taint in left) else None
