"""How much is in a directory tree: counted slowly, in a process of its own."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from external_storage.shares.layout import Site, check_path, opened
from external_storage.shares.making import Parts
from external_storage.shares.share import Share
from external_storage.shares.trash import Pace

_BLOCK = 512
_MAX_DEPTH = 100  # and no deeper: each level costs an open file
_TURN_S = 5.0
_PASSED_OVER = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ESTALE})
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What is in a directory tree."""

    bytes: int
    """On the server's disk: blocks that are allocated, not sizes."""
    files: int
    """Files and directories without the tree's own top, as far as 100 levels down; a file of two
    names is counted twice."""


class UsageCounter:
    """Counts one tree after the other."""

    def __init__(self, share: Share, *, entries_per_s: float) -> None:
        self._share = share
        self._worker = share.background("usage")
        self._entries_per_s = entries_per_s

    def count(self, path: str, stop: Callable[[], bool]) -> Usage | None:
        """All below ``path``; None once ``stop``, asked every few seconds, says so."""
        parts, token = check_path(path), secrets.token_hex(8)
        while not stop():
            usage, finished = self._share.call_in(
                self._worker,
                _TURN_S + self._share.call_limit_s,
                count_on,
                parts,
                token,
                self._entries_per_s,
                _TURN_S,
            )
            if finished:
                return usage
        return None


# -- in the worker's process


@dataclass(slots=True)
class _Walk:
    token: str
    steps: Iterator[Usage]
    usage: Usage


_walk: _Walk | None = None
"""The count that goes on; there is but one at a time."""


def count_on(
    site: Site, parts: Parts, token: str, entries_per_s: float, turn_s: float
) -> tuple[Usage, bool]:
    """Go on with the count of that token, or begin it; what it has found, and whether that is all.

    After the end of the process it begins again.
    """
    global _walk
    if _walk is None or _walk.token != token:
        _walk = _Walk(token, _counting(site, parts), Usage(bytes=0, files=0))
    walk, pace = _walk, Pace(entries_per_s, turn_s)
    with opened(site):  # each turn anew: the mount may have gone since the last
        for usage in walk.steps:
            walk.usage = usage
            if pace.over():
                return usage, False
    _walk = None
    return walk.usage, True


def _counting(site: Site, parts: Parts) -> Iterator[Usage]:
    """The sum so far, after each entry."""
    size = files = 0
    with opened(site) as tree, tree.open_dir(parts) as top:
        device = os.fstat(top).st_dev
        pending: list[Parts] = [()]
        while pending:
            below = pending.pop()
            for facts, name in _entries(top, below):
                files += 1
                size += facts.st_blocks * _BLOCK
                is_inside = stat.S_ISDIR(facts.st_mode) and facts.st_dev == device
                if is_inside and len(below) < _MAX_DEPTH:
                    pending.append((*below, name))
                yield Usage(bytes=size, files=files)


def _entries(top: int, below: Parts) -> Iterator[tuple[os.stat_result, str]]:
    """Of one directory; what cannot be read, or is gone meanwhile, counts nothing."""
    with _passing_over(), ExitStack() as stack:
        directory = top
        # Not by Confined: tenants give names that it would refuse.
        for name in below:
            directory = os.open(name, _DIRECTORY, dir_fd=directory)
            stack.callback(os.close, directory)
        for entry in stack.enter_context(os.scandir(directory)):
            with _passing_over():
                yield entry.stat(follow_symlinks=False), entry.name


@contextmanager
def _passing_over() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _PASSED_OVER:
            raise
