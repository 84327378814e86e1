"""Emptying the trash of a share behind the deletes: slowly, and in a process of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from external_storage.logs import get_logger
from external_storage.shares.layout import TRASH, Site, opened
from external_storage.shares.share import Share, ShareUnavailable

log = get_logger(__name__)

_TURN_S = 20.0
"""How long one call removes files; the next one goes on."""
_JOIN_S = 5.0
_RETRY_S = 30.0
"""After a turn that has come to nothing; whoever wakes the emptier ends the wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Emptied:
    """What one turn has left."""

    finished: bool
    """Whether each directory in the trash has been tried."""
    failed: dict[str, str] = field(default_factory=dict)
    """What cannot be removed, and why; by directory."""
    partly: dict[str, str] = field(default_factory=dict)
    """Likewise, of a directory that is gone on with."""


class Pace:
    """Keeps work to so many steps a second, and to a time that is over some day."""

    def __init__(self, steps_per_s: float, limit_s: float) -> None:
        self._step_s = 1 / steps_per_s
        self._begin = time.monotonic()
        self._end = self._begin + limit_s
        self._steps = 0

    def over(self) -> bool:
        """Wait for the turn of the next step; True once the time is over."""
        self._steps += 1
        now = time.monotonic()
        ahead_s = self._begin + self._steps * self._step_s - now
        if ahead_s > 0.01:  # shorter sleeps are longer than they are told
            time.sleep(min(ahead_s, max(self._end - now, 0)))
        return time.monotonic() >= self._end


def empty(site: Site, skipped: Collection[str], removals_per_s: float, turn_s: float) -> Emptied:
    """In the share's process: remove what is in the trash until ``turn_s`` are over."""
    pace = Pace(removals_per_s, turn_s)
    failed: dict[str, str] = {}
    partly: dict[str, str] = {}
    finished = True
    with opened(site) as tree:
        for entry in tree.listdir(TRASH):
            if entry in skipped:
                continue
            failures: list[OSError] = []
            removed: list[int] = []
            where = (*TRASH, entry)
            if tree.remove_tree(where, stop=pace.over, failures=failures, counted=removed.append):
                continue
            over = pace.over()
            if failures and not (over and any(removed)):
                # Also when the turn was too short to try all of it: the next one would begin with
                # the same failures, and nothing behind it would ever have its turn.
                failed[entry] = _told(failures)
            elif failures:
                partly[entry] = _told(failures)
            if over or not failures:
                finished = False
                break
    return Emptied(finished=finished, failed=failed, partly=partly)


def _told(failures: list[OSError]) -> str:
    first = failures[0]
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return f"{first.filename}: {first.strerror}{more}"


class TrashEmptier:
    """One thread that empties the trash when it is woken. An entry that cannot be removed is tried
    at the next waking; a turn that could not be had, after a pause.

    A directory of 100,000 files keeps nobody waiting: it was moved here in one step.
    """

    def __init__(self, share: Share, *, removals_per_s: float) -> None:
        self._share = share
        self._worker = share.background("trash")
        self._removals_per_s = removals_per_s
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._failed: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name=f"trash-{share.name}", daemon=True)

    def start(self) -> None:
        """Wait to be woken."""
        self._thread.start()

    def stop(self) -> None:
        """To be called when the share has been stopped: that ends a turn."""
        self._stopping.set()
        self._wanted.set()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_S)

    def wake(self) -> None:
        """Empty it, soon."""
        self._wanted.set()

    def problem(self) -> str | None:
        """What cannot be removed and why, in words for people; else None."""
        failed = self._failed
        if not failed:
            return None
        entry, reason = min(failed.items())
        more = f"; {len(failed) - 1} more" if len(failed) > 1 else ""
        return f"{self._share}: deleted data cannot be removed, of {entry}: {reason}{more}"

    def _run(self) -> None:
        retry_s: float | None = None
        while True:
            self._wanted.wait(retry_s)
            self._wanted.clear()
            if self._stopping.is_set():
                return
            retry_s = _RETRY_S
            try:
                self._empty()
                retry_s = None
            except ShareUnavailable as error:
                log.info("the trash waits", share=self._share.name, reason=str(error))
            except Exception:
                log.exception("the trash cannot be emptied", share=self._share.name)

    def _empty(self) -> None:
        failed: dict[str, str] = {}
        while not self._stopping.is_set():
            limit_s = _TURN_S + self._share.call_limit_s
            turn = self._share.call_in(
                self._worker, limit_s, empty, tuple(failed), self._removals_per_s, _TURN_S
            )
            told = turn.failed | turn.partly
            for entry, reason in told.items():
                if self._failed.get(entry) != reason:
                    log.warning(
                        "deleted data cannot be removed",
                        share=self._share.name,
                        entry=entry,
                        reason=reason,
                    )
            failed |= turn.failed
            if turn.finished:
                break
            self._failed = self._failed | told
        self._failed = failed
