"""The volumes' directories on one share: made, found again, removed, archived.

A directory is made in the private one, gets its owner and mode there, is written down with its
inode number, and only then gets its place, in one step. So nobody sees a half-made one, and after a
crash it is certain whether what is in that place was made by us or by somebody else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from external_storage import deadline
from external_storage.assets import AssetRecord, AssetState
from external_storage.errors import ProvisioningFailed
from external_storage.kube.types import PersistentVolumeClaim
from external_storage.logs import get_logger
from external_storage.owner import Owner
from external_storage.shares import making, removing
from external_storage.shares.layout import check_path
from external_storage.shares.making import Ownership, Parts
from external_storage.shares.records import PATH, SHARE, SHARED, PathTaken, ShareRecords
from external_storage.shares.results import DirectoryRefused, Ended, Ending, Made
from external_storage.shares.share import Share, ShareUnavailable
from external_storage.shares.telling import told
from external_storage.shares.trash import TrashEmptier
from external_storage.shares.usage import Usage, UsageCounter

log = get_logger(__name__)

_ADOPTED, _INODE = "adopted", "inode"
_Begin = Callable[..., AssetRecord]
_NOT_OURS = "there is a directory {} that was not made for this volume: it is left alone"
_OURS = frozenset({SHARE, PATH, SHARED, _ADOPTED, _INODE})


class ShareDirectories:
    """The volumes on one share; safe to use from threads.

    Methods that work on the share raise ``ShareUnavailable`` while nothing can be done there,
    ``DirectoryRefused`` for what the server, or what is there, does not allow, and ValueError for a
    path that ``check_path`` refuses.
    """

    def __init__(
        self,
        share: Share,
        *,
        owner: Callable[[], Owner],
        removals_per_s: float = 1000.0,
        counted_per_s: float = 1000.0,
    ) -> None:
        """What is of another ``owner``, as its records say, is never touched.

        The others: how fast the trash is emptied and usage counted at most, in files.
        """
        self.share = share
        self.records = ShareRecords(share, owner=owner)
        self._trash = TrashEmptier(share, removals_per_s=removals_per_s)
        self._usage = UsageCounter(share, entries_per_s=counted_per_s)
        # Each takes several calls, and no other is to come between them. The share's process does
        # one thing at a time anyway.
        self._turn = threading.RLock()
        self._swept: set[str] = set()
        share.before_use(self._look_around)

    # -- life

    def start(self) -> None:
        """Begin to look at the share; does not wait."""
        self._trash.start()
        self.share.start()

    def stop(self) -> None:
        """End all that goes on; whatever it was can be taken up again."""
        self.share.stop()
        self._trash.stop()

    def problem(self) -> str | None:
        """Why claims of this share have to wait, in words for people; None if they need not."""
        return self.share.problem()

    # -- volumes

    def make(
        self,
        name: str,
        *,
        claim: PersistentVolumeClaim,
        path: str,
        ownership: Ownership,
        adopt: bool = False,
        shared: bool = False,
        details: Mapping[str, Any] | None = None,
    ) -> Made:
        """Make the directory of the volume ``name`` at ``path``, or find the one made before.

        Args:
            name, claim: the volume's, and whom it is for.
            path: below the share's directory.
            ownership: of a directory that is made now.
            adopt: take one that is there and that we did not make.
            shared: other volumes of ours that say so, too, may have the same directory.
            details: JSON values for the record; volumes that share a directory have the first's.

        Raises ``PathTaken`` if another volume has that directory or one below or above it.
        """
        parts = check_path(path)
        if clash := _OURS & (details or {}).keys():
            raise ValueError(f"the keys {', '.join(sorted(clash))} of the details are ours")
        placed = {PATH: path, SHARED: shared}
        self.records.owner()  # if that cannot be told, nothing is begun
        with self._alone(), told(self.share, path):
            known = self.records.own(name)
            if known is None and len(parts) > 1:
                # The directories above may have become others' since their records were read.
                self.records.catch_up()
            if known is not None and known.details.get(PATH) != path:
                if known.state is AssetState.PUBLISHED:
                    # Its volume is there, and says so.
                    return self._made(known)
                self.discard(known)
                known = None
            if taken := self.records.conflict(name, path, shared=shared):
                raise PathTaken(taken)
            there = self.share.call(making.look, parts)
            if there is not None and known is not None and _is_of(known, there):
                return self._made(known)
            begin = partial(self._begin, name, claim, placed, details or {})
            if there is None:
                return self._made(self._place(begin, name, parts, ownership))
            if known is not None:
                self.discard(known)
            return self._made(self._join(begin, name, path, there, adopt=adopt))

    def remove(self, name: str, *, path: str | None = None) -> Ended:
        """Move the directory to the trash, from where it is removed behind our back; forget it.

        One that other volumes share only loses this volume. Without a record (of a volume made by
        a predecessor) ``path`` says where it is; with one it must be what the record says, or be
        left out. Empty directories above it go, too, below the base.
        """
        return self._end(name, path, self._remove)

    def archive(self, name: str, *, path: str | None = None, keep_s: float | None = None) -> Ended:
        """As ``remove``, but rename it to a new name ``archived-...`` right below the base.

        After ``keep_s`` seconds ``tidy`` removes it; None: it stays for ever.
        """

        def put_away(name: str, parts: Parts) -> Ended:
            place = self.share.call(removing.archive, name, parts, time.time(), keep_s)
            return Ended(
                ending=Ending.MISSING if place is None else Ending.ARCHIVED, place=place or ""
            )

        return self._end(name, path, put_away)

    def keep(self, name: str, *, in_use: bool = False) -> Ended:
        """Forget the volume, and leave its directory where it is.

        One whose volume was never saved goes if it is empty, unless somebody else has it: by the
        records, or ``in_use``.
        """
        ended = Ended(ending=Ending.KEPT)
        with self._alone(), told(self.share, name):
            record = self.records.own(name)
            is_unsaved = record is not None and record.state is AssetState.PROVISIONING
            path = record.details.get(PATH) if record is not None else None
            if is_unsaved and isinstance(path, str) and not in_use:
                ended = self._end_known(name, record, path, lambda _name, _parts: ended)
            self.records.forget(name)
        return ended

    def discard(self, record: AssetRecord) -> None:
        """Undo what was begun for a record that was never published; see ``Provisioner.discard``.

        Only a directory that we have made and that no other volume has is removed.
        """
        path, inode = record.details.get(PATH), record.details.get(_INODE)
        with self._alone(), told(self.share, str(path)):
            self.records.refuse_foreign(record)
            if isinstance(path, str) and isinstance(inode, int):
                others = self._others(record.name, path, shared=_is_shared(record))
                if not others and not record.details.get(_ADOPTED):
                    self.share.call(removing.to_trash, record.name, check_path(path), inode)
                    self._trash.wake()
                self.share.call(making.drop_new, record.name)
            self.records.forget(record.name)

    # -- what is there

    def exists(self, path: str) -> bool:
        """Whether a directory is at ``path``."""
        with told(self.share, path):
            return self.share.call(making.look, check_path(path)) is not None

    def usage(self, path: str, *, stop: Callable[[], bool] = lambda: False) -> Usage | None:
        """What is in the tree at ``path``, counted slowly and in a process of its own; None if
        ``stop`` said so. Call it from one background thread: it may take hours."""
        with told(self.share, path):
            return self._usage.count(path, stop)

    def trash_entries(self) -> int:
        """How many directories wait to be removed, as last seen."""
        return 0 if self.share.facts is None else self.share.facts.trash

    def trash_problem(self) -> str | None:
        """What in the trash cannot be removed and why, in words for people; else None."""
        return self._trash.problem()

    def tidy(self) -> None:
        """Remove archives whose time is over, what crashes have left, and go on with the trash.

        To be called now and then by the leader (from ``reconcile``). Takes some calls on the share;
        raises nothing: what cannot be done now is done the next time.
        """
        try:
            with self._alone():
                self.records.catch_up()
                self._expire()
                self._sweep()
            self._look_at_trash()
        except ShareUnavailable as error:
            log.debug("a share is not tidied now", share=self.share.name, reason=str(error))
        except OSError as error:
            log.error("a share cannot be tidied", share=self.share.name, error=str(error))

    # -- inside

    def _look_around(self) -> None:
        # Nobody works here now: what has not got its place is for the first ``tidy``.
        self._swept = self.share.call(removing.sweep, (), ())
        self._look_at_trash()

    def _look_at_trash(self) -> None:
        if self.trash_entries() or self.trash_problem():
            self._trash.wake()

    def _begin(
        self,
        name: str,
        claim: PersistentVolumeClaim,
        placed: Mapping[str, Any],
        given: Mapping[str, Any],
        inode: int,
        *,
        adopted: bool = False,
        instead: Mapping[str, Any] | None = None,
    ) -> AssetRecord:
        """``instead``: of what the caller has given."""
        callers = given if instead is None else instead
        details = {**callers, **placed, _INODE: inode, _ADOPTED: adopted}
        return self.records.begin(name, claim=claim, details=details)

    def _place(self, begin: _Begin, name: str, parts: Parts, ownership: Ownership) -> AssetRecord:
        """Make a directory where there is nothing."""
        inode = self.share.call(making.prepare_new, name, ownership)
        record = None
        try:
            record = begin(inode)
            if self.share.call(making.place, name, parts, ownership.parent_mode):
                return record
            raise DirectoryRefused(_NOT_OURS.format("/".join(parts)))
        except (OSError, ProvisioningFailed):
            self.share.call(making.drop_new, name)
            if record is not None and record.state is AssetState.PROVISIONING:
                self.records.forget(name)
            raise

    def _join(self, begin: _Begin, name: str, path: str, there: int, *, adopt: bool) -> AssetRecord:
        """Take a directory that is there, if that is allowed."""
        self.records.catch_up()  # it may be somebody's since they were read
        for other in self.records.holders(path):
            if other != name and (record := self.records.get(other)) is not None:
                self.records.refuse_foreign(record)
                adopted = bool(record.details.get(_ADOPTED))
                return begin(there, adopted=adopted, instead=_callers(record))
        if not adopt:
            raise DirectoryRefused(_NOT_OURS.format(path))
        return begin(there, adopted=True)

    def _made(self, record: AssetRecord) -> Made:
        path = str(record.details[PATH])
        return Made(
            path=path,
            server_path=self.share.server_path(path),
            adopted=bool(record.details.get(_ADOPTED)),
            details=_callers(record),
        )

    def _end(self, name: str, path: str | None, act: Callable[[str, Parts], Ended]) -> Ended:
        with self._alone():
            with told(self.share, path or name):
                record = self.records.own(name)
            known = path if record is None else record.details.get(PATH)
            if not isinstance(known, str):
                return Ended(ending=Ending.MISSING)
            if path not in (None, known):
                raise DirectoryRefused(
                    f"the volume's directory is {known} by its record, not {path}: it is left alone"
                )
            with told(self.share, known):
                ended = self._end_known(name, record, known, act)
                if record is not None:
                    self.records.forget(name)
            return ended

    def _end_known(
        self,
        name: str,
        record: AssetRecord | None,
        path: str,
        act: Callable[[str, Parts], Ended],
    ) -> Ended:
        if self._others(name, path, shared=record is not None and _is_shared(record)):
            return Ended(ending=Ending.SHARED)
        if record is not None and record.state is AssetState.PROVISIONING:
            return self._end_unpublished(record, check_path(path), act)
        return act(name, check_path(path))

    def _end_unpublished(
        self, record: AssetRecord, parts: Parts, act: Callable[[str, Parts], Ended]
    ) -> Ended:
        """Its volume was never saved, or that was not written down: only what is certainly ours
        goes, and what has something in it as the volume wants it."""
        there = self.share.call(making.look, parts)
        if there is None or there != record.details.get(_INODE):
            self.share.call(making.drop_new, record.name)
            return Ended(ending=Ending.MISSING)
        if record.details.get(_ADOPTED):
            return Ended(ending=Ending.KEPT)
        if self.share.call(removing.remove_empty, parts):
            return Ended(ending=Ending.REMOVED)
        return act(record.name, parts)

    def _remove(self, name: str, parts: Parts) -> Ended:
        moved = self.share.call(removing.to_trash, name, parts)
        self._trash.wake()
        return Ended(ending=Ending.REMOVED if moved else Ending.MISSING)

    def _others(self, name: str, path: str, *, shared: bool) -> bool:
        """Whether other volumes have the directory, too. ``PathTaken`` if they do not share it."""
        if shared or name not in self.records:
            # Another replica, on its way out, may have added one; or somebody has adopted it.
            self.records.catch_up()
        if taken := self.records.conflict(name, path, shared=shared):
            raise PathTaken(f"{taken}: it is left alone")
        return any(other != name for other in self.records.holders(path))

    def _expire(self) -> None:
        paths = (record.details.get(PATH) for record in self.records.every())
        taken = {path.split("/")[0] for path in paths if isinstance(path, str)}
        expired = self.share.call(removing.expire, time.time(), taken)
        for place in expired.removed:
            log.info("an archive is removed, its time is over", share=self.share.name, place=place)
            self._trash.wake()
        for place, reason in expired.kept:
            log.warning("an archive is kept", share=self.share.name, place=place, reason=reason)

    def _sweep(self) -> None:
        known = {record.name for record in self.records.every()}
        self._swept = self.share.call(removing.sweep, known, self._swept)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if (problem := self.problem()) is not None:
            # At once: whoever has the turn may wait for the server until its deadline.
            raise ShareUnavailable(problem)
        left_s = deadline.current().remaining()
        if not self._turn.acquire(timeout=min(left_s, threading.TIMEOUT_MAX)):
            raise ShareUnavailable(f"{self.share} is busy")
        try:
            yield
        finally:
            self._turn.release()


def _is_of(record: AssetRecord, inode: int) -> bool:
    return record.state is AssetState.PUBLISHED or record.details.get(_INODE) == inode


def _callers(record: AssetRecord) -> dict[str, Any]:
    return {key: value for key, value in record.details.items() if key not in _OURS}


def _is_shared(record: AssetRecord) -> bool:
    return bool(record.details.get(SHARED))
