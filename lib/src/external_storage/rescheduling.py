"""Giving a claim back to the scheduler."""

from __future__ import annotations

from external_storage.claims import selected_node
from external_storage.errors import ProvisioningFailed, Reschedule
from external_storage.kube.client import Client
from external_storage.kube.errors import Conflict, Invalid, KubeError, NotFound
from external_storage.kube.names import ANN_SELECTED_NODE
from external_storage.kube.request import JSON_PATCH
from external_storage.kube.types import PersistentVolumeClaim


def reschedule(
    client: Client, claim: PersistentVolumeClaim, error: Reschedule
) -> tuple[BaseException, str | None]:
    """Have the scheduler select again, for the reason that ``error`` gives.

    Returns what to report, and the version of the claim without its node (see ``take_node_back``);
    None if it has its node still.
    """
    try:
        return error, take_node_back(client, claim)
    except KubeError as failure:
        problem = ProvisioningFailed(f"{error}; the selected node cannot be taken back: {failure}")
        problem.__cause__ = failure
        return problem, None


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
        live = client.live(claim)
        if live is not None and selected_node(live) == selected_node(claim):
            raise
        return ""
    return changed.metadata.resource_version
