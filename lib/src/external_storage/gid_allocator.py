"""Group ids for volumes: one table for each backend, filled from the volumes there are.

A volume's files belong to a group of its own; the kubelet reads the annotation
``pv.beta.kubernetes.io/gid`` and adds the group to the pods that use the volume. The volumes are
the only record: there is no file to lose or to fall behind.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from external_storage.errors import ProvisioningInBackground
from external_storage.informer import Change
from external_storage.kube.names import ANN_GID
from external_storage.kube.types import PersistentVolume
from external_storage.logs import get_logger

log = get_logger(__name__)

MIN_GID = 2000
"""Lower ones belong to the system and to people; the Go library's limit too."""
MAX_GID = 2**31 - 1
_LARGEST_ID = 2**32 - 2  # of the kernel: the one above means "leave it alone"


class GidsExhausted(Exception):
    """Every gid of a range is taken; the text says which range and what helps."""


def range_problems(
    gid_min: int, gid_max: int, *, minimum: int = MIN_GID, maximum: int = MAX_GID
) -> list[str]:
    """What is wrong with the class parameters gidMin and gidMax: for ``Parameters.validate``."""
    problems = [
        f"parameter {name!r}: {value} is not within {minimum} to {maximum}"
        for name, value in (("gidMin", gid_min), ("gidMax", gid_max))
        if not minimum <= value <= maximum
    ]
    if gid_min > gid_max:
        problems.append(f"parameter 'gidMin': {gid_min} is above gidMax, {gid_max}")
    return problems


class GidAllocator:
    """The table of one backend, for all of its classes; safe to use from several threads.

    Fill it from the volumes' informer, before that is started:
    ``informer.add_handler(allocator.observe)``; or once, by ``seed(lister.all())``.

    A gid is reused as late as possible, not the lowest free one as in Go: a pod that outlives its
    volume keeps the group, and a directory that was archived or retained keeps its files. Each
    range has a cursor that goes round; after a restart it begins above the highest gid in use.
    A step costs O(log n) comparisons in the runs of gids in use, of which there are few.
    """

    def __init__(self, minimum: int = MIN_GID, maximum: int = MAX_GID) -> None:
        """The limits of every range, inclusive. ValueError if there is nothing in between."""
        if not 0 < minimum <= maximum <= _LARGEST_ID:
            raise ValueError(f"no range of gids: {minimum} to {maximum}")
        self.minimum = minimum
        self.maximum = maximum
        self._lock = threading.Lock()
        self._gids: dict[str, int] = {}
        self._holders: dict[int, int] = {}
        """How many keys have a gid: volumes made elsewhere may share one."""
        self._used = _Runs()
        self._cursors: dict[tuple[int, int], int] = {}
        """Where the search in a range goes on; of ranges used so far, so as many as classes."""

    def seed(self, volumes: Iterable[PersistentVolume]) -> None:
        """Take over the gids of ``volumes``, by their names; again for ones made meanwhile.

        A bad annotation is logged and left out, a gid used twice is logged and stays taken until
        both are released.
        """
        for volume in volumes:
            self._take_over(volume)

    def observe(self, change: Change[PersistentVolume]) -> None:
        """An informer's handler: volumes that come are taken over, ones that go release theirs."""
        if change.new is None:
            if change.old is not None:
                self.release(change.old.name)
        elif change.old is None or _annotation(change.old) != _annotation(change.new):
            # Not at other changes: a volume whose asset is gone has released its gid before.
            self._take_over(change.new)

    def allocate(self, key: str, *, minimum: int | None = None, maximum: int | None = None) -> int:
        """The gid of ``key``: the one it has, else a free one from the range, inclusive.

        Args:
            key: the volume's name.
            minimum: the class parameter gidMin; the table's limit without one.
            maximum: gidMax, likewise.

        Raises:
            GidsExhausted: there is no free one in the range.
            ValueError: the range is empty or outside of the table's; names the parameters.
        """
        return self._allocate(key, minimum, maximum)[0]

    @contextmanager
    def reserve(
        self, key: str, *, minimum: int | None = None, maximum: int | None = None
    ) -> Iterator[int]:
        """``allocate`` for a ``with`` block: rolled back if the block raises.

        Not rolled back: a gid the key had before, and one of ProvisioningInBackground, because the
        backend is still at work with it.
        """
        gid, fresh = self._allocate(key, minimum, maximum)
        try:
            yield gid
        except ProvisioningInBackground:
            raise
        except BaseException:
            if fresh:
                self.release(key)
            raise

    def take(self, key: str, gid: int) -> bool:
        """Give ``key`` this very gid, which its asset has already; False if another key has it."""
        with self._lock:
            if self._gids.get(key) == gid:
                return True
            if gid in self._holders:
                return False
            self._drop(key)
            self._put(key, gid)
            return True

    def share(self, key: str, gid: int) -> None:
        """Have ``key`` hold this gid, in place of the one it had, whoever else has it, too: it is
        given to nobody until all of them have released it. For a group of several volumes, or of
        somebody else's; not for a key that ``allocate`` is called with."""
        with self._lock:
            if self._gids.get(key) != gid:
                self._drop(key)
                self._put(key, gid)

    def release(self, key: str) -> None:
        """Give back the gid of ``key``, once its asset is gone; none is fine."""
        with self._lock:
            self._drop(key)

    def __len__(self) -> int:
        """How many keys have a gid."""
        return len(self._gids)

    def _allocate(self, key: str, minimum: int | None, maximum: int | None) -> tuple[int, bool]:
        low = self.minimum if minimum is None else minimum
        high = self.maximum if maximum is None else maximum
        if problems := range_problems(low, high, minimum=self.minimum, maximum=self.maximum):
            raise ValueError("; ".join(problems))
        with self._lock:
            if key in self._gids:
                return self._gids[key], False
            gid = self._next_free(low, high)
            self._put(key, gid)
            self._cursors[low, high] = gid + 1
            return gid, True

    def _next_free(self, low: int, high: int) -> int:
        start = self._cursors.get((low, high))
        if start is None:
            highest = self._used.highest_to(high)
            start = low if highest is None else max(low, highest + 1)
        for begin, end in ((start, high), (low, min(start - 1, high))):
            if begin <= end and (gid := self._used.free_from(begin)) <= end:
                return gid
        raise GidsExhausted(
            f"no gid is free in {low} to {high}: delete volumes, or widen gidMin and gidMax"
        )

    def _take_over(self, volume: PersistentVolume) -> None:
        text = _annotation(volume)
        if text is None:
            return
        # As Go reads it: decimal digits only, so that no two spellings are one gid.
        if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > _LARGEST_ID:
            log.warning("the gid of a volume cannot be read", volume=volume.name, gid=text[:80])
            return
        gid = int(text)
        with self._lock:
            if self._gids.get(volume.name) == gid:
                return
            self._drop(volume.name)
            shared = gid in self._holders
            self._put(volume.name, gid)
        if shared:
            log.warning("volumes share a gid", volume=volume.name, gid=gid)

    def _put(self, key: str, gid: int) -> None:
        self._gids[key] = gid
        self._holders[gid] = self._holders.get(gid, 0) + 1
        if self._holders[gid] == 1:
            self._used.add(gid)

    def _drop(self, key: str) -> None:
        gid = self._gids.pop(key, None)
        if gid is None:
            return
        self._holders[gid] -= 1
        if self._holders[gid] == 0:
            del self._holders[gid]
            self._used.discard(gid)


def _annotation(volume: PersistentVolume) -> str | None:
    return volume.metadata.annotations.get(ANN_GID)


class _Runs:
    """A set of numbers as sorted runs, first and last of each: cursors leave few gaps."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []

    def add(self, number: int) -> None:
        """``number`` must not be in it."""
        at = bisect_right(self._firsts, number)
        joins_left = at > 0 and self._lasts[at - 1] == number - 1
        joins_right = at < len(self._firsts) and self._firsts[at] == number + 1
        if joins_left and joins_right:
            self._lasts[at - 1] = self._lasts.pop(at)
            del self._firsts[at]
        elif joins_left:
            self._lasts[at - 1] = number
        elif joins_right:
            self._firsts[at] = number
        else:
            self._firsts.insert(at, number)
            self._lasts.insert(at, number)

    def discard(self, number: int) -> None:
        """``number`` must be in it."""
        at = bisect_right(self._firsts, number) - 1
        first, last = self._firsts[at], self._lasts[at]
        if first == last:
            del self._firsts[at], self._lasts[at]
        elif number == first:
            self._firsts[at] = number + 1
        elif number == last:
            self._lasts[at] = number - 1
        else:
            self._lasts[at] = number - 1
            self._firsts.insert(at + 1, number + 1)
            self._lasts.insert(at + 1, last)

    def free_from(self, number: int) -> int:
        """The lowest number not in it, from ``number`` on."""
        at = bisect_right(self._firsts, number) - 1
        return self._lasts[at] + 1 if at >= 0 and self._lasts[at] >= number else number

    def highest_to(self, limit: int) -> int | None:
        """The highest number in it up to ``limit``."""
        at = bisect_right(self._firsts, limit) - 1
        return min(self._lasts[at], limit) if at >= 0 else None
