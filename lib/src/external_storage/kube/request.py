"""Requests as data, built before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode

from external_storage.kube.types import KubeObject

JSON = "application/json"
JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"

DEFAULT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, ready to be sent."""

    method: str
    path: str
    verb: str
    """The API verb, as in RBAC: get, list, watch, create, update, patch, delete."""
    resource: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    content_type: str = JSON
    timeout_s: float = DEFAULT_TIMEOUT_S
    compressed: bool = False

    @property
    def target(self) -> str:
        """Path and query, as they go on the wire."""
        return f"{self.path}?{urlencode(self.query)}" if self.query else self.path


def object_path(
    kind: type[KubeObject], *, namespace: str = "", name: str = "", subresource: str = ""
) -> str:
    """The URL path of a kind, of one object, or of its subresource."""
    version = kind.API_VERSION
    parts = ["/apis" if "/" in version else "/api", version]
    if kind.NAMESPACED and namespace:
        parts += ["namespaces", quote(namespace, safe="")]
    parts.append(kind.RESOURCE)
    parts += [quote(part, safe="") for part in (name, subresource) if part]
    return "/".join(parts)
