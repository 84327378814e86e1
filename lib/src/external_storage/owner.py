"""Who has made an asset, where several clusters or provisioners reach the same back end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from external_storage.errors import Unchanged
from external_storage.kube.errors import KubeError
from external_storage.kube.types import KubeObject

if TYPE_CHECKING:
    from external_storage.kube.client import Client

_NAMESPACE = "kube-system"


class Namespace(KubeObject, frozen=True):
    """Only its UID is read."""

    API_VERSION: ClassVar[str] = "v1"
    KIND: ClassVar[str] = "Namespace"
    RESOURCE: ClassVar[str] = "namespaces"


class OwnerUnknown(Unchanged):
    """The API server does not tell which cluster this is; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A provisioner of one cluster: all its replicas, in all their lives."""

    cluster: str
    """The UID of the namespace kube-system, which a cluster has from its first day to its last."""
    names: tuple[str, ...]
    """All provisioner names that it answers to, its own first."""

    def __str__(self) -> str:
        """As it is written on what it makes."""
        return f"{self.cluster}/{self.names[0]}"

    def owns(self, text: str) -> bool:
        """Whether what ``text`` is written on was made by it, under whichever of its names."""
        return text in {f"{self.cluster}/{name}" for name in self.names}


class OwnerFinder:
    """Asks the API server once, when somebody first wants to know; safe to use from threads."""

    def __init__(self, client: Client, names: tuple[str, ...]) -> None:
        self._client = client
        self._names = names
        self._owner: Owner | None = None

    def __call__(self) -> Owner:
        """Raises ``OwnerUnknown``, and asks again the next time."""
        if self._owner is None:
            self._owner = Owner(read_cluster(self._client), self._names)
        return self._owner


def read_cluster(client: Client) -> str:
    """The UID of this cluster's namespace kube-system; ``OwnerUnknown``."""
    try:
        return client.get(Namespace, _NAMESPACE).uid
    except KubeError as error:
        raise OwnerUnknown(
            f"which cluster this is, the UID of its namespace {_NAMESPACE}, cannot be read: "
            f"{error}; allow the provisioner to get it"
        ) from error
