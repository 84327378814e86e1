"""Removing a directory tree through descriptors: no link is followed, no mount is entered."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from external_storage import mountinfo

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Two descriptors and a few stack frames for each level.
_MAX_DEPTH = 32
_MAX_PASSES = 100
_MAX_FAILURES = 100


class Stopped(Exception):
    """``stop`` said so."""


class Removal:
    """One removal of a tree; ``shutil.rmtree`` crosses mounts and fails on 1000 levels."""

    def __init__(
        self, base: int, stop: Callable[[], bool] | None, failures: list[OSError] | None
    ) -> None:
        self.removed = 0
        """How many files and directories are gone by now."""
        self._place = _place(base)
        self._stop = stop
        self._failures = failures
        self._top: int | None = None
        self._hoisted = 0

    def remove(self, name: str, parent: int, *, path: str, depth: int = 0) -> bool:
        """Whether it is gone, or has been moved elsewhere in the tree."""
        if self._stop is not None and self._stop():
            raise Stopped
        try:
            return self._remove(name, parent, path=path, depth=depth)
        except FileNotFoundError:
            return True
        except OSError as error:
            if self._failures is None:
                raise
            if len(self._failures) < _MAX_FAILURES:
                self._failures.append(error)
            return False

    def _remove(self, name: str, parent: int, *, path: str, depth: int) -> bool:
        with _naming(path):
            try:
                os.unlink(name, dir_fd=parent)
                self.removed += 1
                return True
            except IsADirectoryError:
                pass
            if depth > _MAX_DEPTH:
                self._hoist(name, parent)
                return True
            directory = os.open(name, _DIRECTORY, dir_fd=parent)
        failed = len(self._failures or ())
        try:
            if depth == 0:
                self._top = directory
            if _place(directory) != self._place:
                raise OSError(errno.EXDEV, "another file system is mounted here, not removed", path)
            is_empty = self._empty(directory, path=path, depth=depth)
        finally:
            os.close(directory)
        try:
            with _naming(path):
                os.rmdir(name, dir_fd=parent)
                self.removed += 1
        except OSError as error:
            if not is_empty and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False  # what is in it has been told
            raise
        # Gone with what could not be removed from it: the snapshots that some servers show.
        del (self._failures or [])[failed:]
        return True

    def _empty(self, directory: int, *, path: str, depth: int) -> bool:
        """Go through it until nothing is found: a listing may miss what changed meanwhile.

        False if something in it cannot be removed."""
        passes, failed = 0, len(self._failures or ())
        while passes < _MAX_PASSES:
            found, left, hoisted = 0, 0, self._hoisted
            del (self._failures or [])[failed:]
            with os.scandir(directory) as entries:
                for entry in entries:
                    found += 1
                    below = f"{path}/{entry.name}"
                    left += not self.remove(entry.name, directory, path=below, depth=depth + 1)
            if found == left:
                return not left
            passes += self._hoisted == hoisted
        raise OSError(errno.ENOTEMPTY, "somebody keeps writing to it", path)

    def _hoist(self, name: str, parent: int) -> None:
        """Too deep for our descriptors: move it up to the top, to be removed from there."""
        assert self._top is not None
        target = f".removing-{secrets.token_hex(8)}"
        with suppress(FileNotFoundError):
            os.rename(name, target, src_dir_fd=parent, dst_dir_fd=self._top)
        self._hoisted += 1


def _place(directory: int) -> tuple[int, int]:
    # The mount tells a bind mount of the same device, the device a btrfs subvolume.
    return mountinfo.mount_id(directory), os.fstat(directory).st_dev


@contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = path, None
        raise
