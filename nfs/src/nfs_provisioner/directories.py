"""The directories volumes live in: made, moved to the trash, emptied.

Names are single path components that we check ourselves, and every step goes through descriptors
of the two directories it works in, so that a link planted by a tenant leads nowhere. Durable: what
a call has returned from is there after a power cut.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from external_storage import sync_directory
from external_storage.confine import Confined
from external_storage.logs import get_logger

log = get_logger(__name__)

_NAME = re.compile(r"[a-z0-9-][a-z0-9.-]*")
_MAX_NAME = 253  # a Kubernetes object name
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def check_name(name: str) -> str:
    """``name``, if it is fit to be a volume's directory; else ValueError.

    One path component of lower-case letters, digits, dots and dashes, at most 253 bytes, no
    leading dot: what Kubernetes allows for a PersistentVolume, and never ours (``.state``).
    """
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise ValueError(f"not a volume name: {name[:80]!r}")
    return name


class RootInUse(Exception):
    """Another process serves this export root."""


class VolumeDirectories:
    """One directory per volume right below ``root``; ``state_dir`` is ours and never exported.

    ``state_dir`` must be on the file system of ``root``: the trash is filled by renaming.
    """

    def __init__(self, root: Path, state_dir: Path) -> None:
        self.root = root
        self._state_dir = state_dir
        self._trash = state_dir / "trash"
        self._lock: int | None = None

    def prepare(self) -> None:
        """Make ``state_dir`` (mode 0700) and the trash. To be called once, before the rest.

        Raises ValueError if ``root`` has a link in it: Ganesha reports exports by the path it was
        given, and we open no links. Raises PermissionError if ``state_dir`` belongs to somebody
        else, who could then read and forge what we keep there; NotADirectoryError if it is a link;
        other OSErrors; ``RootInUse`` if another process has the root.
        """
        if (resolved := self.root.resolve(strict=True)) != self.root:
            raise ValueError(f"{self.root} has a link in it, use {resolved}")
        self._state_dir.mkdir(mode=0o700, exist_ok=True)
        with _opened(self._state_dir) as state:
            owner = os.fstat(state).st_uid
            if owner != os.geteuid():
                raise PermissionError(f"{self._state_dir} belongs to uid {owner}, not to us")
            os.fchmod(state, 0o700)
        self._take_lock()
        self._trash.mkdir(mode=0o700, exist_ok=True)

    def release(self) -> None:
        """Let another process have the root."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        """Hold the root for as long as we live: two processes would give out the same ids."""
        if self._lock is not None:
            return
        path = self._state_dir / "lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise RootInUse(
                f"{self.root} is in use by another nfs-provisioner: only one may serve it"
            ) from None
        self._lock = descriptor

    def path(self, name: str) -> Path:
        """Where the volume's directory is, whether it exists or not. ValueError for a bad name."""
        return self.root / check_name(name)

    def create(self, name: str, *, mode: int, gid: int | None) -> Path:
        """Make the directory with exactly ``mode`` (the umask plays no part) and group ``gid``.

        ``gid`` None leaves the group alone. One that exists is kept with what is in it, and only
        gets the mode and group again. Raises ValueError for a bad name, NotADirectoryError if a
        link or a file is in its place, other OSErrors.
        """
        check_name(name)
        with _opened(self.root) as root:
            try:
                # Closed until it has its group: nobody of another one may come in first.
                os.mkdir(name, 0o700, dir_fd=root)
            except FileExistsError:
                _refuse_other_kinds(name, root)
            with _opened(name, dir_fd=root) as directory:
                if gid is not None:
                    os.fchown(directory, -1, gid)
                os.fchmod(directory, mode)  # after chown, which clears the set-gid bit
                os.fsync(directory)
            os.fsync(root)
        return self.root / name

    def exists(self, name: str) -> bool:
        """Whether there is anything under the name. ValueError for a bad name."""
        return os.path.lexists(self.path(name))

    def remove_empty(self, name: str) -> bool:
        """Remove the directory if nothing is in it; False if it is not empty. Missing is fine."""
        try:
            self.path(name).rmdir()
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                return False
            raise
        sync_directory(self.root)
        return True

    def trash(self, name: str) -> Path | None:
        """Move the directory out of sight at once; None if there is none.

        The path in the trash has a random part, so a second volume of the same name is no matter.
        Raises ValueError for a bad name, OSError.
        """
        check_name(name)
        # Cut, because the random part must fit into the 255 bytes of a file name as well.
        target = f"{name[:200]}.{secrets.token_hex(8)}"
        with _opened(self.root) as root, _opened(self._trash) as trash:
            try:
                os.rename(name, target, src_dir_fd=root, dst_dir_fd=trash)
            except FileNotFoundError:
                return None
            os.fsync(trash)
            os.fsync(root)
        return self._trash / target

    def empty_trash(self, stop: Callable[[], bool] = lambda: False) -> list[str]:
        """Remove all that is in the trash; the names of the entries that are still there.

        An entry that cannot be removed is logged and left for the next time, the others go.
        ``stop`` is asked before each file; what is left then goes the next time, too.
        """
        with Confined(self._trash) as trash:
            for name in trash.listdir():
                if stop():
                    break
                try:
                    trash.remove_tree(name, stop=stop)
                except OSError as error:
                    log.warning(
                        "could not remove a deleted volume's data", entry=name, error=str(error)
                    )
            return sorted(trash.listdir())

    def trash_entries(self) -> int:
        """How many things wait in the trash."""
        return sum(1 for _ in self._trash.iterdir())


@contextmanager
def _opened(path: Path | str, *, dir_fd: int | None = None) -> Iterator[int]:
    """A descriptor of a directory that is no link."""
    descriptor = os.open(path, _DIRECTORY, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _refuse_other_kinds(name: str, root: int) -> None:
    """A plain error for what open(O_NOFOLLOW) would refuse with ELOOP or ENOTDIR right after."""
    mode = os.stat(name, dir_fd=root, follow_symlinks=False).st_mode
    if not stat.S_ISDIR(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no directory"
        raise NotADirectoryError(f"{kind} is in the place of the volume {name}")
