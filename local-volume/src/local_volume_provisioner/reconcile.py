"""One pass: look at everything, decide about each path, and do what needs no waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from external_storage import Lister, PersistentVolume, get_logger
from external_storage.kube.errors import KubeError
from external_storage.kube.types import KubeObject
from local_volume_provisioner import identity, records
from local_volume_provisioner.board import Board, Entry, entry_of
from local_volume_provisioner.config import Config
from local_volume_provisioner.decide import Action, Decision, View
from local_volume_provisioner.duplicates import choose
from local_volume_provisioner.ledger import Ledger, Record, Use
from local_volume_provisioner.mounts import MountTable
from local_volume_provisioner.names import rounded
from local_volume_provisioner.node import NodeFacts
from local_volume_provisioner.offers import Offers
from local_volume_provisioner.requests import Request, Requests, Wish
from local_volume_provisioner.scan import Candidate, Inventory, Note, Scanner
from local_volume_provisioner.states import State
from local_volume_provisioner.views import Facts, Views
from local_volume_provisioner.volumes import VolumeApi
from local_volume_provisioner.whereabouts import Whereabouts

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
    whereabouts: Whereabouts
    is_being_cleaned: Callable[[str], bool]
    """By path."""


class Reconciler:
    """Makes passes; keeps what the last one found."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._ledger = parts.ledger
        self._requests = parts.requests
        self._gone: deque[PersistentVolume] = deque()
        self._withdrawn: set[str] = set()
        """UIDs of those that we have deleted and the watch may still show."""
        self.last: Facts | None = None

    def run(
        self, config: Config, node: NodeFacts, api: VolumeApi, inventory: Inventory | None
    ) -> dict[str, Decision]:
        """One pass; ``inventory`` None has the directories looked at. What was decided, by path."""
        parts = self._parts
        table = MountTable.read()
        is_fresh = inventory is None
        inventory = inventory or parts.scanner.scan(config.classes, table)
        volumes = self._volumes()
        back, doubts = parts.whereabouts.bring_back(volumes, api)
        volumes |= {path: volume for volume in back if (path := _path(volume))}
        parts.offers.remember(back)
        self._note_use(config, volumes, inventory, node.cluster)
        choice = choose(
            (candidate for found in inventory.candidates.values() for candidate in found),
            lambda candidate: parts.views.rank(candidate, volumes.get(candidate.path)),
        )
        facts = self.last = Facts(
            config=config, node=node, table=table, inventory=inventory, volumes=volumes,
            doubts=doubts, wishes=self._wishes(volumes, doubts, inventory), choice=choice,
        )  # fmt: skip
        parts.views.follow_disks(facts)
        views = parts.views.all(facts)
        decisions = parts.views.decisions(views)
        if not is_fresh and paths_with(decisions, (Action.OFFER,)):
            # Nothing is offered by what was seen some time ago.
            return self.run(config, node, api, None)
        self._drop_approvals(views)
        self._refresh(views)
        self._retire(views, decisions)
        self._act(views, decisions, api)
        self._show(views, decisions, facts)
        return decisions

    def look_again(self, path: str, live: PersistentVolume | None) -> View | None:
        """The view of one path on fresh facts; None before the first pass."""
        return self._parts.views.fresh(path, live, self.last) if self.last is not None else None

    def _volumes(self) -> dict[str, PersistentVolume]:
        """By path; those that were created a moment ago too, which the watch has not shown yet. Of
        two with one path the one that somebody has."""
        found = [*self._parts.offers.not_seen_yet(), *self._parts.volumes.all()]
        found.sort(key=lambda volume: volume.status.phase == "Bound")
        self._withdrawn &= {volume.uid for volume in found}
        return {
            path: volume
            for volume in found
            if (path := _path(volume)) and volume.uid not in self._withdrawn
        }

    def volume_gone(self, volume: PersistentVolume) -> None:
        """As it was last, from the watch: a claim may have come and gone with it between two
        passes, or its reclaim policy have changed."""
        self._gone.append(volume)

    # -- what people ask for

    def _wishes(
        self,
        volumes: Mapping[str, PersistentVolume],
        doubts: Mapping[str, str],
        inventory: Inventory,
    ) -> dict[str, tuple[Request, ...]]:
        by_name = {volume.name: path for path, volume in volumes.items()}
        found: dict[str, tuple[Request, ...]] = {}
        for request in self._requests.all():
            path = by_name.get(request.target, request.target)
            if request.wish is Wish.OFFER:
                volume = volumes.get(path)
                name = volume.name if volume else doubts.get(path, "")
                self._offer_as_new(path, name, inventory.candidates.get(path, []))
                self._requests.remove(request)
            elif request.wish is Wish.CLEAN and self._is_met(path, volumes.get(path)):
                self._requests.remove(request)
            else:
                found[path] = (*found.get(path, ()), request)
        return found

    def _is_met(self, path: str, volume: PersistentVolume | None) -> bool:
        """Whether there is nothing (left) to clean; a wish must not wait for the next user."""
        if volume is not None:
            return volume.status.phase in ("Available", "Bound")
        record = self._ledger.get(path)
        return record is None or record.use in (Use.CLEAN, Use.OFFERING, Use.RETIRED)

    def _offer_as_new(self, path: str, volume: str, found: Sequence[Candidate]) -> None:
        record = self._ledger.get(path)
        if record is not None and not volume:
            self._keep_for_its_disk(record, found)
            record = self._ledger.get(path)
        if volume:
            log.warning("not offered: it has a volume", path=path, volume=volume)
        elif self._parts.is_being_cleaned(path) or not self._ledger.swap(record, None, path):
            log.warning("not offered: it is being cleaned", path=path)
        else:
            log.warning("offered as it is, as somebody has asked for", path=path)

    def _keep_for_its_disk(self, record: Record, found: Sequence[Candidate]) -> None:
        """What is offered as it is may be another disk than the one on record: that one is as dirty
        as before, and may come under another name."""
        path = record.path
        same = any(identity.is_same_disk(record.identity, one.identity) for one in found)
        is_in_doubt = record.dirty or record.use is Use.OFFERED
        if is_in_doubt and not same and not self._parts.is_being_cleaned(path):
            self._ledger.move(path, records.without_path(record))

    def _drop_approvals(self, views: Mapping[str, View]) -> None:
        """Of another disk, or another user's data, than was shown when they were given."""
        for path, requests in self.last.wishes.items() if self.last is not None else ():
            view = views.get(path)
            for request in requests:
                if request.wish is Wish.CLEAN and (view is None or not view.approved):
                    log.warning("an approval holds no more: it is not as it was", path=path)
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
            if (record := records.retired(view.record, view.candidate)) is not None:
                self._ledger.write([record])
                self._requests.remove(request)
                decisions[view.path] = Decision(Action.NOTHING, State.RETIRED)

    # -- what is remembered

    def _note_use(
        self,
        config: Config,
        volumes: Mapping[str, PersistentVolume],
        inventory: Inventory,
        cluster: str,
    ) -> None:
        """A claim on a volume makes it dirty, whatever becomes of the volume; and volumes that
        came without a record of ours (the reference's) get one."""
        while self._gone:
            gone = self._gone.popleft()
            record = self._ledger.get(_path(gone))
            if record is not None and record.uid == gone.uid:
                self._ledger.swap(record, records.noted(record, gone, cluster), record.path)
        fresh = []
        for path, volume in volumes.items():
            found = self._ledger.get(path)
            if (record := found) is None:
                kind = config.classes.get(volume.spec.storage_class_name)
                candidates = inventory.candidates.get(path, [None])
                record = records.first(path, volume, kind, candidates[0])
            if record is not None and (now := records.noted(record, volume, cluster)) != found:
                fresh.append(now)
        self._ledger.write(fresh)

    def _refresh(self, views: Mapping[str, View]) -> None:
        """What is the same disk in a new boot, or has grown, is known by its ids of today."""
        for path, view in views.items():
            if view.record is not None and view.candidate is not None:
                now = records.refreshed(view.record, view.candidate)
                if now != view.record:
                    self._ledger.swap(view.record, now, path)

    # -- what is done at once

    def _act(
        self, views: Mapping[str, View], decisions: dict[str, Decision], api: VolumeApi
    ) -> None:
        offers = [views[p] for p, d in decisions.items() if d.action is Action.OFFER]
        outcomes = self._parts.offers.make(offers, api)
        decisions |= outcomes
        for path, outcome in outcomes.items():
            if outcome.state is State.BUSY:
                self._is_busy(path, outcome.reason)
        for path, decision in decisions.items():
            try:
                self._act_on(views[path], decision, api)
            except KubeError as error:
                log.warning("a volume cannot be changed", path=path, error=str(error))

    def _is_busy(self, path: str, reason: str) -> None:
        """Until the next look at the directories."""
        assert self.last is not None
        found = self.last.inventory.candidates
        found[path] = [replace(candidate, busy=reason) for candidate in found.get(path, ())]

    def _act_on(self, view: View, decision: Decision, api: VolumeApi) -> None:
        volume, candidate = view.volume, view.candidate
        if volume is None:
            return
        if decision.action is Action.WITHDRAW:
            self._withdraw(view, volume, decision, api)
        elif candidate is None:
            return
        elif decision.action is Action.GROW:
            api.grow(volume, rounded(candidate.size))
        elif (
            (record := self._ledger.get(view.path)) is not None
            and record.uid == volume.uid
            and record.identity != view.volume_identity
        ):
            # One of the reference's, or in another boot: it is known from the volume as well.
            api.note_identity(volume, record.identity)

    def _withdraw(
        self, view: View, volume: PersistentVolume, decision: Decision, api: VolumeApi
    ) -> None:
        api.withdraw(volume)
        self._withdrawn.add(volume.uid)
        log.warning("a free volume is withdrawn", volume=volume.name, reason=decision.reason)
        record = self._ledger.get(view.path)
        if decision.state is State.RETIRED:
            now = records.retired(record, view.candidate)
        else:
            now = records.withdrawn(record) if record is not None else None
        self._ledger.swap(record, now, view.path)

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


def _path(volume: PersistentVolume) -> str:
    return volume.spec.local.path if volume.spec.local is not None else ""


def _shown(view: View, decision: Decision, note: Note | None) -> Decision:
    if note is None or view.volume is not None or view.record is not None:
        return decision
    state = State.INVALID if note.is_problem else State.IGNORED
    return Decision(decision.action, state, note.text)


def paths_with(decisions: Mapping[str, Decision], actions: Iterable[Action]) -> list[str]:
    """The paths about which one of these was decided."""
    wanted = set(actions)
    return [path for path, decision in decisions.items() if decision.action in wanted]
