"""The one node that a provisioner in node mode serves."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from external_storage.kube.client import Client
from external_storage.kube.errors import KubeError
from external_storage.kube.types import Node
from external_storage.logs import get_logger
from external_storage.provisioner import Provisioner

log = get_logger(__name__)

_RETRY_S = 5.0


class OwnNode:
    """The labels of the node, read once."""

    def __init__(self, client: Client, provisioner: Provisioner[Any, Any]) -> None:
        self._client = client
        self._provisioner = provisioner
        self._labels: Mapping[str, str] | None = None

    def labels(self) -> Mapping[str, str] | None:
        """None for a provisioner that serves all nodes."""
        return self._labels

    def read(self, stopping: threading.Event) -> bool:
        """Read the labels, however long that takes; False: told to stop before that."""
        name = self._provisioner.node_name
        while name is not None and self._labels is None:
            try:
                self._labels = self._client.get(Node, name).metadata.labels
            except KubeError as error:
                log.warning("our node cannot be read", node=name, error=str(error))
                if stopping.wait(_RETRY_S):
                    return False
        return True
