"""Giving a claim back to the scheduler."""

from __future__ import annotations

from external_storage.claims import selected_node
from external_storage.kube.client import Client
from external_storage.kube.errors import Conflict, Invalid, NotFound
from external_storage.kube.names import ANN_SELECTED_NODE
from external_storage.kube.request import JSON_PATCH
from external_storage.kube.types import PersistentVolumeClaim


def take_node_back(client: Client, claim: PersistentVolumeClaim) -> str:
    """Remove the selected node from the claim, so that the scheduler selects again.

    Returns the version of the claim without it; ``""`` if the claim is gone or has another node
    already. Raises ``KubeError`` if it could not be done.
    """
    path = "/metadata/annotations/" + ANN_SELECTED_NODE.replace("/", "~1")
    patch = [
        {"op": "test", "path": "/metadata/uid", "value": claim.uid},
        {"op": "test", "path": path, "value": selected_node(claim)},
        {"op": "remove", "path": path},
    ]
    try:
        changed = client.patch(
            PersistentVolumeClaim,
            claim.name,
            patch,
            namespace=claim.namespace,
            content_type=JSON_PATCH,
        )
    except (NotFound, Conflict, Invalid):
        return ""
    return changed.metadata.resource_version
