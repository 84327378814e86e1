"""From everything that is known on the node to one view of each path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from external_storage import PersistentVolume
from local_volume_provisioner import identity
from local_volume_provisioner.brake import Brake
from local_volume_provisioner.cleaning import directories
from local_volume_provisioner.cleaning.directories import MountTask
from local_volume_provisioner.config import ClassConfig, Config
from local_volume_provisioner.decide import Action, Decision, View, decide
from local_volume_provisioner.duplicates import Choice
from local_volume_provisioner.ledger import Ledger, Record, Use
from local_volume_provisioner.mounts import LOCAL, MountTable
from local_volume_provisioner.node import NodeFacts
from local_volume_provisioner.requests import Request, Wish
from local_volume_provisioner.scan import Candidate, Inventory, Scanner
from local_volume_provisioner.volumes import identity_of

_PHASES = {"Bound": 0, "Available": 1, "Pending": 1}


@dataclass(slots=True)
class Failures:
    """Wipes in a row that have failed, by path, and why the last one has."""

    count: dict[str, int] = field(default_factory=dict)
    reason: dict[str, str] = field(default_factory=dict)

    def note(self, path: str, reason: str) -> None:
        self.count[path] = self.count.get(path, 0) + 1
        self.reason[path] = reason

    def forget(self, path: str) -> None:
        self.count.pop(path, None)
        self.reason.pop(path, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What one pass goes by."""

    config: Config
    node: NodeFacts
    table: MountTable
    inventory: Inventory
    volumes: Mapping[str, PersistentVolume]
    """By path."""
    doubts: Mapping[str, str]
    """By path: why its volume must not be taken for gone."""
    wishes: Mapping[str, tuple[Request, ...]]
    """By path."""
    choice: Choice


class Views:
    """Puts views together."""

    def __init__(
        self, scanner: Scanner, ledger: Ledger, brake: Brake, failures: Failures, *, dry_run: bool
    ) -> None:
        self._scanner = scanner
        self._ledger = ledger
        self._brake = brake
        self._failures = failures
        self._dry_run = dry_run

    def all(self, facts: Facts) -> dict[str, View]:
        """Of every path that is there, or remembered, or in a volume."""
        remembered = (
            record.path
            for record in self._ledger.all()
            if (record.dirty or record.use is Use.OFFERED) and record.path.startswith("/")
        )
        found = {*facts.inventory.candidates, *facts.inventory.notes, *facts.volumes, *facts.doubts}
        found |= set(remembered)
        return {path: self._view(path, facts) for path in sorted(found)}

    def decisions(self, views: Mapping[str, View]) -> dict[str, Decision]:
        """About each; what the brake holds is decided again with it."""
        decided = {path: decide(view) for path, view in views.items()}
        waiting = [p for p, d in decided.items() if d.action is Action.CLEAN and _waits(views[p])]
        self._brake.note(waiting)
        return decided | {path: decide(self._with_brake(views[path])) for path in waiting}

    def fresh(self, path: str, live: PersistentVolume | None, last: Facts) -> View:
        """One path looked at anew, before something is done to it; ``live`` is its volume as the
        API server has it now."""
        volumes = {p: v for p, v in last.volumes.items() if p != path}
        if live is not None:
            volumes[path] = live
        config = self._config_of(path, last.config, live)
        inventory, table = Inventory(), MountTable.read()
        if config is not None:
            name = path.removeprefix(f"{config.host_dir}/")
            inventory.add(self._scanner.look(config, name, table))
        chosen = {path: found[0] for path, found in inventory.candidates.items()}
        duplicates = last.choice.duplicates
        if path in duplicates:
            chosen = {}
        facts = replace(
            last, table=table, inventory=inventory, volumes=volumes,
            choice=Choice(chosen, duplicates),
        )  # fmt: skip
        return self._with_brake(self._view(path, facts))

    def follow_disks(self, facts: Facts) -> None:
        """What is remembered goes with the disk, should it have come under another name."""
        index: dict[str, list[Record]] | None = None
        for path, candidate in list(facts.choice.chosen.items()):
            record = self._ledger.get(path)
            if path in facts.volumes or (record is not None and record.use is Use.RETIRED):
                continue
            if record is not None and _is_disk_of(record, candidate):
                continue
            if index is None:
                index = _by_marks(self._ledger.all())
            others = _elsewhere(index, path, candidate, facts.choice.chosen)
            reasons = {
                other.path: _why_it_stays(other, candidate, record, facts) for other in others
            }
            stays = next((f"{p}, {why}" for p, why in reasons.items() if why), None)
            if stays is not None:
                facts.choice.duplicates[path] = f"it is the disk of {stays}"
                del facts.choice.chosen[path]
            elif (
                others
                and others[0].identity.kind == candidate.identity.kind
                # Else what is known of the disk that had this name would be lost.
                and not (record is not None and (record.dirty or record.use is Use.OFFERED))
            ):
                self._ledger.move(others[0].path, path)
                index = None

    def rank(self, candidate: Candidate, volume: PersistentVolume | None) -> int:
        """Of duplicates: volumes in use come first, then free ones, then what was one; last what
        cannot be one, such as a disk beside the LVM volume that is on it."""
        name = candidate.class_config.name
        if volume is not None and volume.spec.storage_class_name == name:
            return _PHASES.get(volume.status.phase, 2)
        record = self._ledger.get(candidate.path)
        if record is not None and record.saved_class.name == name:
            return 3
        return 5 if candidate.busy else 4

    def _view(self, path: str, facts: Facts) -> View:
        volume, record = facts.volumes.get(path), self._ledger.get(path)
        candidate = facts.choice.chosen.get(path)
        duplicate = facts.choice.duplicates.get(path, "")
        note = facts.inventory.notes.get(path)
        saved = self._config_of(path, facts.config, volume)
        if candidate is None and not duplicate and note is None and saved is not None:
            # Of a class that is not in the configuration any more.
            found = self._scanner.look(saved, path.removeprefix(f"{saved.host_dir}/"), facts.table)
            candidate, note = (found, None) if isinstance(found, Candidate) else (None, found)
        wishes = facts.wishes.get(path, ())
        return View(
            path=path,
            doubt=facts.doubts.get(path, ""),
            cluster=facts.node.cluster,
            candidate=candidate,
            absent=note.text if note is not None else "it is not there",
            duplicate=duplicate,
            volume=volume,
            volume_identity=identity_of(volume) if volume is not None else None,
            record=record,
            config=facts.config.classes.get(_class_name(volume, candidate, record)),
            approved=path not in facts.doubts
            and any(_holds(request, volume, candidate) for request in wishes),
            retiring=any(request.wish is Wish.RETIRE for request in wishes),
            failures=self._failures.count.get(path, 0),
            failure=self._failures.reason.get(path, ""),
            dry_run=self._dry_run,
            is_empty=volume is None and _is_empty(candidate, record),
        )

    def _config_of(
        self, path: str, config: Config, volume: PersistentVolume | None
    ) -> ClassConfig | None:
        """The class that a path belongs to, as it is, or as it was when it was last seen."""
        record = self._ledger.get(path)
        name = record.saved_class.name if record is not None else ""
        if volume is not None:
            name = volume.spec.storage_class_name
        current = config.classes.get(name)
        if current is not None and path.startswith(f"{current.host_dir}/"):
            return current
        return record.saved_class.config() if record is not None else None

    def _with_brake(self, view: View) -> View:
        reason = self._brake.reason()
        return view if not reason or _already_begun(view) else replace(view, brake=reason)


def _class_name(
    volume: PersistentVolume | None, candidate: Candidate | None, record: Record | None
) -> str:
    if volume is not None:
        return volume.spec.storage_class_name
    if candidate is not None:
        return candidate.class_config.name
    return record.saved_class.name if record is not None else ""


def _by_marks(found: Iterable[Record]) -> dict[str, list[Record]]:
    index: dict[str, list[Record]] = {}
    for record in found:
        for mark in identity.marks(record.identity):
            index.setdefault(mark, []).append(record)
    return index


def _elsewhere(
    index: Mapping[str, list[Record]],
    path: str,
    candidate: Candidate,
    chosen: Mapping[str, Candidate],
) -> list[Record]:
    """What is known of its disk under other paths, where that disk is no more."""
    marks = identity.marks(candidate.identity)
    found = {record.path: record for mark in marks for record in index.get(mark, ())}
    others = [
        record
        for other, record in sorted(found.items())
        if other != path
        and _is_disk_of(record, candidate)
        and (other not in chosen or not _is_disk_of(record, chosen[other]))
    ]
    return sorted(others, key=lambda record: not record.dirty)


def _why_it_stays(
    other: Record, candidate: Candidate, own: Record | None, facts: Facts
) -> str | None:
    """Why what is known under another path does not go with the disk; None if it can."""
    if other.path in facts.volumes or other.path in facts.doubts:
        return "whose volume is still there"
    if not other.dirty and other.use is not Use.OFFERED:
        return None  # there is nothing on it that anybody must not see
    if other.identity.kind != candidate.identity.kind:
        return "which holds somebody's data as another kind of volume"
    if other.saved_class.name != candidate.class_config.name:
        return f"which holds somebody's data of class {other.saved_class.name}"
    if own is not None and (own.dirty or own.use is Use.OFFERED):
        return "and this name has another one on record: clean or offer that first"
    return None


def _holds(request: Request, volume: PersistentVolume | None, candidate: Candidate | None) -> bool:
    """Whether it approves of cleaning what is there now, for whoever has it now."""
    return (
        request.wish is Wish.CLEAN
        and candidate is not None
        and request.uid == (volume.uid if volume is not None else "")
        and request.disk == identity.digest(candidate.identity)
    )


def _is_disk_of(record: Record, candidate: Candidate) -> bool:
    return identity.is_same_disk(record.identity, candidate.identity)


def _is_same(record: Record, candidate: Candidate) -> bool:
    found = identity.compare(record.identity, candidate.identity)
    return found.verdict is identity.Verdict.SAME


def _is_empty(candidate: Candidate | None, record: Record | None) -> bool:
    if candidate is None or candidate.identity.fs_type not in LOCAL:
        return False  # a device; or nobody waits for a server here, and a person decides
    if record is None or record.dirty or not _is_same(record, candidate):
        return False
    task = MountTask(candidate.mount_path, candidate.number, candidate.identity)
    return directories.is_empty(task)


def _waits(view: View) -> bool:
    """Whether it would be cleaned, but for the brake."""
    return not view.approved and not _already_begun(view)


def _already_begun(view: View) -> bool:
    return view.record is not None and view.record.use is Use.CLEANING
