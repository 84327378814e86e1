"""What AWS says of the file systems, kept for a while: no claim waits for it twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from efs_provisioner.aws import Aws, FileSystemFacts, MountTarget
from external_storage import Infeasible, ProvisionerError, ProvisioningFailed, get_logger
from external_storage.kube.types import (
    NodeSelector,
    NodeSelectorRequirement,
    NodeSelectorTerm,
    VolumeNodeAffinity,
)

log = get_logger(__name__)

T = TypeVar("T")

ZONE_LABEL: Final = "topology.kubernetes.io/zone"
KEEP_S: Final = 600.0
_AVAILABLE: Final = "available"


class Facts:
    """Zones and mount targets; safe to use from threads. Raises what ``Aws`` raises."""

    def __init__(self, aws: Aws, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._systems = _Kept(aws.file_system, clock)
        self._targets = _Kept(aws.mount_targets, clock)

    def affinity(self, file_system: str) -> VolumeNodeAffinity | None:
        """The nodes of its zone; None for a regional file system, which all can use."""
        facts: FileSystemFacts = self._systems.get(file_system)
        if not facts.zone:
            return None
        zone = NodeSelectorRequirement(key=ZONE_LABEL, operator="In", values=(facts.zone,))
        terms = (NodeSelectorTerm(match_expressions=(zone,)),)
        return VolumeNodeAffinity(required=NodeSelector(node_selector_terms=terms))

    def address(self, file_system: str, zone: str) -> str:
        """The address of its mount target in a zone."""
        targets: list[MountTarget] = self._targets.get(file_system)
        found = [target for target in targets if target.zone == zone]
        if not found:
            zones = ", ".join(target.zone for target in targets) or "no zone"
            raise Infeasible(
                f"file system {file_system} has no mount target in {zone}: there are some in "
                f"{zones}; make one, or change the parameter 'az'"
            )
        if found[0].state != _AVAILABLE or not found[0].address:
            raise ProvisioningFailed(
                f"mount target {found[0].id} in {zone} is {found[0].state}, not {_AVAILABLE}"
            )
        return found[0].address


class _Kept(Generic[T]):
    """Answers by file system; an old one is better than none. One file system is asked about once
    at a time, and those who wait for a refusal get it, too."""

    def __init__(self, ask: Callable[[str], T], clock: Callable[[], float]) -> None:
        self._ask = ask
        self._clock = clock
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}
        self._known: dict[str, tuple[float, T]] = {}
        self._refused: dict[str, tuple[float, ProvisionerError]] = {}

    def get(self, file_system: str) -> T:
        began = self._clock()
        with self._lock:
            turn = self._turns.setdefault(file_system, threading.Lock())
        with turn:
            known = self._known.get(file_system)
            if known is not None and self._clock() < known[0] + KEEP_S:
                return known[1]
            refused = self._refused.get(file_system)
            if refused is not None and refused[0] > began:
                raise refused[1]
            try:
                answer = self._ask(file_system)
            except ProvisionerError as error:
                if known is None:
                    self._refused[file_system] = (self._clock(), error)
                    raise
                log.warning("old facts are used", file_system=file_system, error=str(error))
                answer = known[1]
            self._known[file_system] = (self._clock(), answer)
            return answer
