"""One pass: look at everything, decide about each path, and do what needs no waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from external_storage import Lister, PersistentVolume, get_logger
from external_storage.kube.errors import KubeError
from external_storage.kube.types import KubeObject
from local_volume_provisioner.board import Board, Entry, entry_of
from local_volume_provisioner.config import Config
from local_volume_provisioner.decide import Action, Decision, View
from local_volume_provisioner.duplicates import choose
from local_volume_provisioner.ledger import Ledger, Record, SavedClass, Use
from local_volume_provisioner.mounts import MountTable
from local_volume_provisioner.names import rounded
from local_volume_provisioner.node import NodeFacts
from local_volume_provisioner.offers import Offers
from local_volume_provisioner.requests import Request, Requests, Wish
from local_volume_provisioner.scan import Inventory, Note, Scanner
from local_volume_provisioner.states import State
from local_volume_provisioner.views import Facts, Views
from local_volume_provisioner.volumes import VolumeApi, identity_of

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a reconciler works with."""

    scanner: Scanner
    ledger: Ledger
    volumes: Lister[PersistentVolume]
    requests: Requests
    board: Board
    views: Views
    offers: Offers


class Reconciler:
    """Makes passes; keeps what the last one found."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._ledger = parts.ledger
        self._requests = parts.requests
        self._gone: deque[PersistentVolume] = deque()
        self.last: Facts | None = None

    def run(
        self, config: Config, node: NodeFacts, api: VolumeApi, inventory: Inventory | None
    ) -> dict[str, Decision]:
        """One pass; ``inventory`` None has the directories looked at. What was decided, by path."""
        parts = self._parts
        table = MountTable.read()
        inventory = inventory or parts.scanner.scan(config.classes, table)
        volumes = self._volumes()
        self._note_use(config, volumes, inventory)
        choice = choose(
            (candidate for found in inventory.candidates.values() for candidate in found),
            lambda candidate: parts.views.rank(candidate, volumes.get(candidate.path)),
        )
        facts = self.last = Facts(
            config=config, node=node, table=table, inventory=inventory, volumes=volumes,
            wishes=self._wishes(volumes), choice=choice,
        )  # fmt: skip
        parts.views.follow_disks(facts)
        views = parts.views.all(facts)
        decisions = parts.views.decisions(views)
        self._retire(views, decisions)
        self._act(views, decisions, api)
        self._show(views, decisions, facts)
        return decisions

    def look_again(self, path: str, live: PersistentVolume | None) -> View | None:
        """The view of one path on fresh facts; None before the first pass."""
        return self._parts.views.fresh(path, live, self.last) if self.last is not None else None

    def _volumes(self) -> dict[str, PersistentVolume]:
        """By path; those that were created a moment ago too, which the watch has not shown yet."""
        found = [*self._parts.offers.not_seen_yet(), *self._parts.volumes.all()]
        return {volume.spec.local.path: volume for volume in found if volume.spec.local is not None}

    def volume_gone(self, volume: PersistentVolume) -> None:
        """As it was last, from the watch: a claim may have come and gone with it between two
        passes, and it is known then that it was used."""
        if _shows_use(volume):
            self._gone.append(volume)

    # -- what people ask for

    def _wishes(self, volumes: Mapping[str, PersistentVolume]) -> dict[str, frozenset[Wish]]:
        by_name = {volume.name: path for path, volume in volumes.items()}
        found: dict[str, frozenset[Wish]] = {}
        for request in self._requests.all():
            path = by_name.get(request.target, request.target)
            if request.wish is Wish.OFFER:
                self._offer_as_new(request, path, volumes.get(path))
            elif request.wish is Wish.CLEAN and self._is_met(path, volumes.get(path)):
                self._requests.remove(request)
            else:
                found[path] = found.get(path, frozenset()) | {request.wish}
        return found

    def _is_met(self, path: str, volume: PersistentVolume | None) -> bool:
        """Whether there is nothing (left) to clean; a wish must not wait for the next user."""
        if volume is not None:
            return volume.status.phase in ("Available", "Bound")
        record = self._ledger.get(path)
        return record is None or record.use in (Use.CLEAN, Use.OFFERING, Use.RETIRED)

    def _offer_as_new(self, request: Request, path: str, volume: PersistentVolume | None) -> None:
        if volume is None:
            self._ledger.forget(path)
            log.warning("offered as it is, as somebody has asked for", path=path)
        else:
            log.warning("not offered: it has a volume", path=path, volume=volume.name)
        self._requests.remove(request)

    def _retire(self, views: Mapping[str, View], decisions: dict[str, Decision]) -> None:
        """What has neither a volume nor anybody's data goes out of service at once."""
        for request in self._requests.all():
            if request.wish is not Wish.RETIRE:
                continue
            view = views.get(request.target) or next(
                (v for v in views.values() if v.volume and v.volume.name == request.target), None
            )
            if view is None or view.volume is not None or (view.record and view.record.dirty):
                continue
            if (record := _retired(view)) is not None:
                self._ledger.write([record])
                self._requests.remove(request)
                decisions[view.path] = Decision(Action.NOTHING, State.RETIRED)

    # -- what is remembered

    def _note_use(
        self, config: Config, volumes: Mapping[str, PersistentVolume], inventory: Inventory
    ) -> None:
        """A claim on a volume makes it dirty, whatever becomes of the volume; and volumes that
        came without a record of ours (the reference's) get one."""
        while self._gone:
            self._note_gone(self._gone.popleft())
        fresh = []
        for path, volume in volumes.items():
            record = self._ledger.get(path)
            if record is None:
                record = _first_record(path, volume, config, inventory)
            if record is not None and (noted := _noted(record, volume)) is not None:
                fresh.append(noted)
        self._ledger.write(fresh)

    def _note_gone(self, volume: PersistentVolume) -> None:
        record = self._ledger.get(volume.spec.local.path) if volume.spec.local else None
        if record is not None and record.use is Use.OFFERED and record.uid == volume.uid:
            self._ledger.write([msgspec.structs.replace(record, use=Use.USED)])

    # -- what is done at once

    def _act(
        self, views: Mapping[str, View], decisions: dict[str, Decision], api: VolumeApi
    ) -> None:
        offers = [views[p] for p, d in decisions.items() if d.action is Action.OFFER]
        decisions |= self._parts.offers.make(offers, api)
        for path, decision in decisions.items():
            try:
                self._act_on(views[path], decision, api)
            except KubeError as error:
                log.warning("a volume cannot be changed", path=path, error=str(error))

    def _act_on(self, view: View, decision: Decision, api: VolumeApi) -> None:
        volume, candidate, record = view.volume, view.candidate, view.record
        if volume is None or candidate is None:
            return
        if decision.action is Action.GROW:
            api.grow(volume, rounded(candidate.size))
        elif decision.action is Action.WITHDRAW:
            api.withdraw(volume)
            if (retired := _retired(view)) is not None:
                self._ledger.write([retired])
        elif view.volume_identity is None and record is not None:
            # One of the reference's: so that it is known from the volume as well.
            api.note_identity(volume, record.identity)

    # -- what is shown

    def _show(
        self, views: Mapping[str, View], decisions: Mapping[str, Decision], facts: Facts
    ) -> None:
        notes = facts.inventory.notes
        entries = [
            entry_of(view, _shown(view, decisions[path], notes.get(path)))
            for path, view in views.items()
        ]
        board = self._parts.board
        board.node = facts.node.name

        def about(entry: Entry) -> KubeObject:
            return facts.volumes.get(entry.path) or facts.node.node

        board.update(entries, about)
        board.tell_classes(facts.inventory.class_problems, facts.node.node)


def _shows_use(volume: PersistentVolume) -> bool:
    return volume.spec.claim_ref is not None or volume.status.phase in ("Bound", "Released")


def _noted(record: Record, volume: PersistentVolume) -> Record | None:
    """The record with what the volume shows; None where that is nothing new."""
    if record.use is Use.RETIRED or (record.uid == volume.uid and record.use is not Use.OFFERED):
        return None
    # Of another UID: made anew by somebody, perhaps from a backup. What is dirty stays so.
    use = Use.USED if _shows_use(volume) or record.dirty else Use.OFFERED
    noted = msgspec.structs.replace(record, use=use, uid=volume.uid)
    return noted if noted != record or not record.uid else None


def _first_record(
    path: str, volume: PersistentVolume, config: Config, inventory: Inventory
) -> Record | None:
    """What is there is taken for what the volume was made of, unless that says other things; of a
    released one nobody can say it, and a person is asked before it is cleaned."""
    known = identity_of(volume)
    kind = config.classes.get(volume.spec.storage_class_name)
    found = inventory.candidates.get(path)
    if known is None and found and volume.status.phase in ("Available", "Bound"):
        known = found[0].identity
    if known is None or kind is None:
        return None
    return Record(path=path, saved_class=SavedClass.of(kind), use=Use.OFFERED, identity=known)


def _retired(view: View) -> Record | None:
    if view.record is not None:
        return msgspec.structs.replace(view.record, use=Use.RETIRED, uid="")
    if view.candidate is None:
        return None
    return Record(
        path=view.path,
        saved_class=SavedClass.of(view.candidate.class_config),
        use=Use.RETIRED,
        identity=view.candidate.identity,
    )


def _shown(view: View, decision: Decision, note: Note | None) -> Decision:
    if note is None or view.volume is not None or view.record is not None:
        return decision
    state = State.INVALID if note.is_problem else State.IGNORED
    return Decision(decision.action, state, note.text)


def paths_with(decisions: Mapping[str, Decision], actions: Iterable[Action]) -> list[str]:
    """The paths about which one of these was decided."""
    wanted = set(actions)
    return [path for path, decision in decisions.items() if decision.action in wanted]
