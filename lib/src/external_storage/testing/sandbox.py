"""Claims, classes and volumes of one provisioner name in one namespace, as a test handles them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from external_storage.kube.client import Client
from external_storage.kube.errors import KubeError, NotFound
from external_storage.kube.names import ANN_PROVISIONED_BY
from external_storage.kube.types import (
    Event,
    KubeObject,
    PersistentVolume,
    PersistentVolumeClaim,
    StorageClass,
)
from external_storage.testing.waiting import LIMIT_S, wait_until

K = TypeVar("K", bound=KubeObject)

_THREADS: Final = 8


@dataclass(kw_only=True)
class Sandbox:
    """What users and admins do; it goes past whatever stands between provisioner and server."""

    api: Client
    """With all rights."""
    namespace: str
    provisioner: str
    """The provisioner name."""
    limit_s: float = LIMIT_S
    """How long is waited for anything."""
    _made: list[KubeObject] = field(default_factory=list)
    """Outside the namespace; removed by ``clean_up``."""

    # -- making

    def storage_class(self, suffix: str = "", **fields: Any) -> StorageClass:  # noqa: ANN401
        """A class of ours, named after the namespace."""
        body = {
            "metadata": {"name": f"{self.namespace}{suffix}"},
            "provisioner": self.provisioner,
            **fields,
        }
        return self.make(StorageClass, body)

    def claim(
        self,
        name: str,
        storage_class: StorageClass,
        **spec: Any,  # noqa: ANN401
    ) -> PersistentVolumeClaim:
        """A claim of 1 Mi, ReadWriteOnce unless ``spec`` says other things."""
        body = {
            "metadata": {"name": name},
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "storageClassName": storage_class.name,
                "resources": {"requests": {"storage": "1Mi"}},
                **spec,
            },
        }
        return self.api.create(PersistentVolumeClaim, body, namespace=self.namespace)

    def claims_at_once(
        self,
        names: Iterable[str],
        storage_class: StorageClass,
        **spec: Any,  # noqa: ANN401
    ) -> None:
        """One claim for each name, as fast as the API server takes them."""
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda name: self.claim(name, storage_class, **spec), names))

    def make(self, kind: type[K], fields: dict[str, Any]) -> K:
        """An object outside of namespaces, which ``clean_up`` removes."""
        made = self.api.create(kind, fields)
        self._made.append(made)
        return made

    # -- looking

    def get_claim(self, name: str) -> PersistentVolumeClaim:
        return self.api.get(PersistentVolumeClaim, name, namespace=self.namespace)

    def claims(self) -> list[PersistentVolumeClaim]:
        return self.api.list_all(PersistentVolumeClaim, namespace=self.namespace)

    def volumes(self) -> list[PersistentVolume]:
        """All volumes that were provisioned for claims of our namespace."""
        return [
            volume
            for volume in self.api.list_all(PersistentVolume)
            if volume.metadata.annotations.get(ANN_PROVISIONED_BY) == self.provisioner
            and volume.spec.claim_ref is not None
            and volume.spec.claim_ref.namespace == self.namespace
        ]

    def get_volume(self, name: str) -> PersistentVolume | None:
        """None: it is gone."""
        try:
            return self.api.get(PersistentVolume, name)
        except NotFound:
            return None

    def events(self, about: str, reason: str = "") -> list[Event]:
        """What the provisioner has told about one of our claims, or a volume."""
        namespaces = (self.namespace, "default")
        return [
            event
            for namespace in namespaces
            for event in self.api.list_all(Event, namespace=namespace)
            if event.involved_object.name == about
            and reason in ("", event.reason)
            and event.source.component == self.provisioner
        ]

    # -- waiting

    def wait(self, met: Any, what: str) -> Any:  # noqa: ANN401
        """``wait_until`` with our limit, and with what users see if it never comes."""
        return wait_until(met, what, limit_s=self.limit_s, explain=self.describe)

    def wait_bound(self, *names: str) -> list[PersistentVolume]:
        """Wait until these claims are Bound; their volumes in the same order."""
        found: dict[str, str] = {}

        def bound() -> bool:
            found.update({c.name: c.spec.volume_name for c in self.claims() if is_bound(c)})
            return all(name in found for name in names)

        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        self.wait(bound, f"claim {shown} is Bound")
        return [self.api.get(PersistentVolume, found[name]) for name in names]

    def wait_phase(self, volume: str, phase: str) -> PersistentVolume:
        """Wait until a volume has this phase."""

        def reached() -> PersistentVolume | None:
            found = self.get_volume(volume)
            return found if found is not None and found.status.phase == phase else None

        found: PersistentVolume = self.wait(reached, f"volume {volume} is {phase}")
        return found

    def wait_event(self, about: str, reason: str) -> Event:
        found = self.wait(lambda: self.events(about, reason), f"an event {reason} about {about}")
        event: Event = found[0]
        return event

    # -- ending

    def delete_claims(self, *names: str) -> None:
        """Delete these claims, or all; it is not waited for their end."""

        def delete(claim: PersistentVolumeClaim) -> None:
            with contextlib.suppress(NotFound):
                self.api.delete(
                    PersistentVolumeClaim, claim.name, uid=claim.uid, namespace=self.namespace
                )

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(delete, [c for c in self.claims() if not names or c.name in names]))

    def clean_up(self) -> None:
        """Remove what is left of claims, volumes and classes, whether anybody agrees or not."""
        with contextlib.suppress(KubeError):
            self.delete_claims()
        for volume in [*self.volumes(), *self._made]:
            kind = type(volume)
            with contextlib.suppress(KubeError):
                self.api.patch(kind, volume.name, {"metadata": {"finalizers": None}})
                self.api.delete(kind, volume.name, uid=volume.uid)
        self._made.clear()

    def describe(self) -> str:
        """Claims, volumes and events, for who has to find out why a wait did not end."""
        lines = [f"claim {c.name}: {c.status.phase} {c.spec.volume_name}" for c in self.claims()]
        lines += [f"volume {v.name}: {v.status.phase}" for v in self.volumes()]
        for event in self.api.list_all(Event, namespace=self.namespace):
            about = f"{event.involved_object.kind} {event.involved_object.name}"
            lines.append(f"event about {about}: {event.reason}: {event.message}")
        return "\n".join(lines)


def is_bound(claim: PersistentVolumeClaim) -> bool:
    return claim.status.phase == "Bound" and bool(claim.spec.volume_name)
