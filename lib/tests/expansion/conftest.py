"""A provisioner that can expand, on the real control plane, through a proxy which can lose things.

``rig.api`` speaks to the server itself, so that what a test does and sees has no faults.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from external_storage import Expanded, PersistentVolume, PersistentVolumeClaim
from external_storage.kube.request import STRATEGIC_PATCH
from external_storage.testing import FaultProxy

CLAIMS, CLAIM_STATUS = "persistentvolumeclaims", "persistentvolumeclaims/status"
VOLUMES = "persistentvolumes"
LIMIT_S = 60.0


@dataclass
class Growth:
    """What was asked of ``expand`` and what it does; claims made, grown and looked at."""

    rig: Any
    proxy: FaultProxy
    until: Callable[..., Any]
    release: threading.Event
    asked: list[int] = field(default_factory=list)
    volumes: list[PersistentVolume] = field(default_factory=list)
    does: Callable[[int], Expanded] = Expanded

    def expand(self, volume: PersistentVolume, capacity: int) -> Expanded:
        self.asked.append(capacity)
        self.volumes.append(volume)
        return self.does(capacity)

    def hold(self) -> threading.Event:
        """Calls wait for ``release``; the event that is set when the first has begun."""
        entered = threading.Event()

        def wait(capacity: int) -> Expanded:
            entered.set()
            assert self.release.wait(LIMIT_S)
            return Expanded(capacity)

        self.does = wait
        return entered

    # -- doing

    def start(self, claim: str = "data", **settings: str) -> Any:
        """A provisioner, and a Bound claim of 1Gi of a class that allows expansion."""
        provisioner = self.rig.start(**settings)
        self.rig.claim(claim, self.rig.storage_class(allowVolumeExpansion=True))
        self.rig.bound(claim)
        return provisioner

    def restart(self, **settings: str) -> None:
        """What the process had in memory is gone."""
        self.rig.manager.stop()
        self.rig.start(**settings)

    def patch(self, fields: dict[str, Any], claim: str = "data") -> None:
        rig = self.rig
        rig.api.patch(PersistentVolumeClaim, claim, fields, namespace=rig.namespace)

    def patch_status(self, claim: str = "data", **fields: Any) -> None:
        """What another controller, or we before a crash, would have written."""
        self.rig.api.patch(
            PersistentVolumeClaim,
            claim,
            {"status": fields},
            namespace=self.rig.namespace,
            subresource="status",
            content_type=STRATEGIC_PATCH,
        )

    def ask_for(self, size: str, claim: str = "data") -> None:
        self.patch({"spec": {"resources": {"requests": {"storage": size}}}}, claim)

    def finish_on_node(self, size: str) -> None:
        """What the kubelet writes."""
        self.patch_status(
            capacity={"storage": size},
            allocatedResourceStatuses={"storage": None},
            conditions=[{"type": "FileSystemResizePending", "$patch": "delete"}],
        )

    def grow_other(self) -> None:
        """Another claim is made and grown to 7Gi: by then we have seen all that came before."""
        self.rig.claim("other", self.rig.namespace)
        self.rig.bound("other")
        self.ask_for("7Gi", "other")
        size = self.rig.bound("other").spec.capacity
        self.until(
            lambda: self.rig.bound("other").spec.capacity["storage"] == "7Gi", f"7Gi, not {size}"
        )

    # -- looking

    def status(self, claim: str = "data") -> str:
        """The resize status that the claim shows."""
        statuses: dict[str, str] = self.rig.get_claim(claim).status.allocated_resource_statuses
        return statuses.get("storage", "")

    def wait_status(self, status: str) -> None:
        self.until(lambda: self.status() == status, f"the claim shows {status}")

    def conditions(self, claim: str = "data") -> dict[str, str]:
        """Those about expansion and our own, with their messages; others have some too."""
        shown = self.rig.get_claim(claim).status.conditions
        known = ("Resiz", "example.com")
        return {c.type: c.message for c in shown if any(word in c.type for word in known)}

    def wait_size(self, size: str, claim: str = "data") -> PersistentVolume:
        """Wait until the claim has this capacity and nothing is left to do; its volume."""

        def has_it() -> bool:
            status = self.rig.get_claim(claim).status
            found = (status.capacity["storage"], status.allocated_resource_statuses)
            return found == (size, {})

        self.until(has_it, f"claim {claim} has {size}")
        volume: PersistentVolume = self.rig.bound(claim)
        assert volume.spec.capacity["storage"] == size
        assert not [kind for kind in self.conditions(claim) if "Resiz" in kind]
        return volume

    def metric(self, name: str) -> float:
        registry = self.rig.provisioner.context.metrics.registry
        full = f"external_storage_expansion{name}"
        return float(registry.get_sample_value(full, {"class": self.rig.namespace}) or 0.0)

    def requests(self) -> list[tuple[str, str]]:
        """Those about single claims and volumes, in their order; not what was refused, as when the
        controller manager was writing conditions into the claim."""
        found = [(r.verb, r.resource) for r in self.proxy.requests if r.status == 200]
        about = (CLAIMS, CLAIM_STATUS, VOLUMES)
        return [one for one in found if one[1] in about and one[0] not in ("list", "watch")]


@pytest.fixture
def rig(proxy: FaultProxy, rig: Any) -> Any:
    """As always, but its provisioners reach the server through the proxy."""
    rig.plane = SimpleNamespace(kubeconfig=proxy.kubeconfig())
    return rig


@pytest.fixture
def growth(rig: Any, proxy: FaultProxy, until: Callable[..., Any]) -> Iterator[Growth]:
    """Every provisioner of this test can expand, unless the test takes ``expand`` away."""
    made = Growth(rig, proxy, until, threading.Event())
    rig.methods["expand"] = lambda _provisioner, volume, capacity: made.expand(volume, capacity)
    yield made
    # What a test holds by it is let go at its end, whatever the end is.
    made.release.set()
