"""The state of every entry, kept for people: /volumes, events on change, metrics."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable

import msgspec

from external_storage import EventRecorder, PersistentVolume, get_logger
from external_storage.kube.types import KubeObject
from local_volume_provisioner.cleaning.machine import Progress
from local_volume_provisioner.decide import Decision, View
from local_volume_provisioner.identity import compare, digest
from local_volume_provisioner.scan import Kind
from local_volume_provisioner.states import WARNINGS, State

log = get_logger(__name__)


class Entry(msgspec.Struct, rename="camel", frozen=True):
    """One line of ``local-volume list``."""

    path: str
    class_name: str
    state: State
    reason: str = ""
    volume: str = ""
    uid: str = ""
    """Of the volume."""
    disk: str = ""
    """What an approval is for, with the UID: tells this disk, as it is now, from all others."""
    phase: str = ""
    claim: str = ""
    kind: str = ""
    size: int = 0
    device: str = ""
    ids: dict[str, str] = {}
    """What the disk says of itself."""
    identity: str = ""
    """How what is there compares with what was written down."""
    use: str = ""
    """What the node remembers of it."""
    method: str = ""
    leaves: str = ""
    """Whether old data can be read after a cleaning."""
    progress: float = 0.0
    """Of a cleaning, 0 to 1; stays 0 where nobody can tell."""


class Status(msgspec.Struct, rename="camel", frozen=True):
    """What ``/volumes`` answers."""

    node: str
    entries: list[Entry]
    class_problems: dict[str, str] = {}
    config_problems: list[str] = []
    brake: str = ""


class Board:
    """Holds what was decided last, and tells of what has changed."""

    def __init__(self, events: EventRecorder, progress: Callable[[str], Progress | None]) -> None:
        self._events = events
        self._progress = progress
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._told: dict[str, tuple[State, str]] = {}
        self._told_classes: dict[str, str] = {}
        self.node = ""
        self.class_problems: dict[str, str] = {}
        self.config_problems: list[str] = []
        self.brake = ""

    def update(self, entries: Iterable[Entry], about: Callable[[Entry], KubeObject | None]) -> None:
        """Replace all entries; an event for each that has come into a state that needs somebody."""
        fresh = {entry.path: entry for entry in entries}
        for entry in fresh.values():
            now = (entry.state, entry.reason)
            if self._told.get(entry.path) == now:
                continue
            log.info(
                "entry is", path=entry.path, state=entry.state.value, reason=entry.reason
            ) if entry.state is not State.IGNORED else None
            target = about(entry)
            is_bad = entry.state in WARNINGS or (entry.state is State.OFFERING and entry.reason)
            if is_bad and target is not None:
                self._events.warning(target, entry.state.value, f"{entry.path}: {entry.reason}")
        self._told = {entry.path: (entry.state, entry.reason) for entry in fresh.values()}
        with self._lock:
            self._entries = fresh

    def tell_classes(self, problems: dict[str, str], node: KubeObject) -> None:
        """What is wrong with whole classes."""
        for name, text in problems.items():
            if self._told_classes.get(name) != text:
                log.warning("class cannot be discovered", class_name=name, reason=text)
                self._events.warning(node, "ClassProblem", f"class {name}: {text}")
        self._told_classes = self.class_problems = dict(problems)

    def status(self) -> Status:
        with self._lock:
            entries = [self._with_progress(e) for _, e in sorted(self._entries.items())]
        return Status(
            node=self.node,
            entries=entries,
            class_problems=self.class_problems,
            config_problems=self.config_problems,
            brake=self.brake,
        )

    def render(self) -> bytes:
        return msgspec.json.encode(self.status())

    def count(self) -> Counter[State]:
        with self._lock:
            return Counter(entry.state for entry in self._entries.values())

    def _with_progress(self, entry: Entry) -> Entry:
        progress = self._progress(entry.path)
        if progress is None:
            return entry
        return msgspec.structs.replace(
            entry, state=State.CLEANING, progress=round(progress.ratio, 4)
        )


def entry_of(view: View, decision: Decision) -> Entry:
    """What is shown of one path."""
    volume, candidate, record = view.volume, view.candidate, view.record
    config = view.config or (record.saved_class.config() if record is not None else None)
    method = leaves = compared = ""
    if config is not None and candidate is not None:
        is_mount = candidate.kind is Kind.MOUNT
        method = "delete files" if is_mount else str(config.method)
        leaves = "files are gone" if is_mount else config.method.leaves
    if view.recorded is not None and candidate is not None:
        found = compare(view.recorded, candidate.identity)
        compared = f"{found.verdict}: {found.why}"
    return Entry(
        path=view.path,
        class_name=_class_of(view, volume),
        state=decision.state,
        reason=decision.reason,
        volume=volume.name if volume is not None else "",
        uid=volume.uid if volume is not None else "",
        disk=digest(candidate.identity) if candidate is not None else "",
        phase=volume.status.phase if volume is not None else "",
        claim=_claim(volume),
        kind=candidate.kind if candidate is not None else "",
        size=candidate.size if candidate is not None else 0,
        device=candidate.identity.device if candidate is not None else "",
        ids=candidate.identity.hardware if candidate is not None else {},
        identity=compared,
        use=record.use if record is not None else "",
        method=method,
        leaves=leaves,
    )


def _class_of(view: View, volume: PersistentVolume | None) -> str:
    if volume is not None:
        return volume.spec.storage_class_name
    if view.candidate is not None:
        return view.candidate.class_config.name
    return view.record.saved_class.name if view.record is not None else ""


def _claim(volume: PersistentVolume | None) -> str:
    reference = volume.spec.claim_ref if volume is not None else None
    return f"{reference.namespace}/{reference.name}" if reference is not None else ""
