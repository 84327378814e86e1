"""Wakes the agent: when a watched directory changes, and when the table of mounts does.

A mount over an entry raises no inotify event, and one over a watched directory leaves the watch on
the directory below; the kernel tells of both by POLLPRI on mountinfo, and every watch is then made
anew by its path.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from inotify_simple import INotify, flags

from external_storage import get_logger

log = get_logger(__name__)

_MASK = (
    flags.CREATE
    | flags.DELETE
    | flags.MOVED_FROM
    | flags.MOVED_TO
    | flags.DELETE_SELF
    | flags.MOVE_SELF
    | flags.UNMOUNT
    | flags.ONLYDIR
)


class Watcher:
    """Tells of changes from a thread of its own."""

    def __init__(self, *, on_entries: Callable[[], None], on_mounts: Callable[[], None]) -> None:
        self._on_entries = on_entries
        self._on_mounts = on_mounts
        self._lock = threading.Lock()
        self._watches: dict[str, int] = {}
        self._inotify = INotify()
        self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._end, self._ending = os.pipe()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        os.close(self._ending)
        if self._thread.ident is not None:
            self._thread.join()
        self._inotify.close()
        os.close(self._mounts)
        os.close(self._end)

    def watch(self, directories: Collection[str]) -> None:
        """Watch these and no others; one that is not there is tried again after the next change.

        Call it before each look at the directories: what happens after that is told.
        """
        with self._lock:
            fresh: dict[str, int] = {}
            for path in directories:
                try:
                    fresh[path] = self._inotify.add_watch(path, _MASK)
                except OSError as error:
                    log.debug("a directory cannot be watched", path=path, error=error.strerror)
            # The same directory gives the same number, another one at its path a new one.
            for number in set(self._watches.values()) - set(fresh.values()):
                try:
                    self._inotify.rm_watch(number)
                except OSError:
                    log.debug("a watch had ended", watch=number)
            self._watches = fresh

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._inotify.fileno(), select.POLLIN)
        poller.register(self._mounts, select.POLLPRI | select.POLLERR)
        poller.register(self._end, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in poller.poll()]
            if self._end in ready:
                return
            if self._inotify.fileno() in ready:
                self._inotify.read(timeout=0)
                self._on_entries()
            if self._mounts in ready:
                self._on_mounts()


def is_on_one_path(mount_point: str, directory: str) -> bool:
    one, other = f"{mount_point.rstrip('/')}/", f"{directory}/"
    return one.startswith(other) or other.startswith(one)


def link_targets(directories: set[str]) -> set[str]:
    """The directories that links in these lead to: there a disk appears or goes."""
    found: set[str] = set()
    for directory in directories:
        try:
            links = [path for path in Path(directory).iterdir() if path.is_symlink()]
            found |= {str((path.parent / path.readlink()).parent) for path in links}
            found |= {str(path.resolve().parent) for path in links}
        except OSError as error:
            log.debug("links cannot be read", directory=directory, error=error.strerror)
    return found
