"""Work below one directory that never leaves it, whatever the paths say and whoever moves links.

Every step goes by a descriptor of the directory it works in, opened one path component at a time
with ``O_NOFOLLOW`` from a base that was opened once. A component that is a symbolic link is an
error, and one that becomes a link in the middle of a call is too: the descriptor still is the
directory that was opened. ``openat2(RESOLVE_BENEATH)`` would save the walk, but Python has no call
for it, older container runtimes forbid it, and mkdir, rename and unlink need the descriptor of the
parent all the same; so there is one way, and it works everywhere.

What this cannot see: a directory that is moved out of the base while it is open. Links in the path
*to* the base are not looked at either: that path is the admin's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from external_storage.durable import sync_directory
from external_storage.removal import Removal, Stopped

Relative = str | tuple[str, ...]
"""A path below the base: text with ``/`` between the segments, or the segments."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_SEGMENT_BYTES = 255
_MAX_PATH_BYTES = 4096
_RENAME_NOREPLACE = 1


def check(relative: Relative) -> tuple[str, ...]:
    """The segments of ``relative``, if it is strictly below any base; else ValueError."""
    parts = tuple(relative.split("/")) if isinstance(relative, str) else tuple(relative)
    shown = repr("/".join(parts))[:120]
    if not parts or parts == ("",):
        raise ValueError("an empty path: want at least one segment below the base")
    if parts[0] == "" and isinstance(relative, str):
        raise ValueError(f"{shown} is absolute: want a path relative to the base")
    for part in parts:
        if wrong := _problem(part):
            raise ValueError(f"{shown} {wrong}")
    if (length := len(os.fsencode("/".join(parts)))) > _MAX_PATH_BYTES:
        raise ValueError(f"{shown} has {length} bytes: at most {_MAX_PATH_BYTES} are allowed")
    return parts


def _problem(part: str) -> str | None:
    if part == "":
        return "has an empty segment: want exactly one '/' between segments"
    if part in (".", ".."):
        return f"has the segment {part!r}: want names only"
    if "/" in part:
        return f"has a '/' within the segment {part!r:.80}: want one name in each"
    if any(unicodedata.category(character) == "Cc" for character in part):
        return "has a NUL or control character: want printable ones"
    try:
        length = len(os.fsencode(part))
    except UnicodeEncodeError:
        return "is not valid Unicode: want text that has bytes as a file name"
    if length > _MAX_SEGMENT_BYTES:
        return f"has a segment of {length} bytes: at most {_MAX_SEGMENT_BYTES} are allowed"
    return None


class Confined:
    """The tree below ``base``. Close it, or use it in a ``with``; safe to use from threads.

    Every method takes a path below the base and raises ValueError for one that ``check`` refuses,
    NotADirectoryError if a directory on the way is a link or no directory, other OSErrors as the
    system has them. What a method has changed is on disk when it returns. A mount below the base
    may be worked in, but is never removed from.
    """

    def __init__(self, base: Path) -> None:
        """Open ``base``. NotADirectoryError if it is a link itself, other OSErrors."""
        self.base = base
        self._descriptor = os.open(base, _DIRECTORY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the base; twice is once."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def fileno(self) -> int:
        """The descriptor of the base, to ask what it is on. ValueError when closed."""
        if self._descriptor < 0:
            raise ValueError(f"{self.base} has been closed")
        return self._descriptor

    @contextmanager
    def open_dir(self, relative: Relative | None = None) -> Iterator[int]:
        """A descriptor of a directory; of the base without a path. Closed at the end."""
        descriptor = self._walk(() if relative is None else check(relative))
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def stat(self, relative: Relative) -> os.stat_result:
        """As ``lstat``: of a link at the end it tells about the link. FileNotFoundError."""
        with self._parent(check(relative)) as (parent, name):
            return os.stat(name, dir_fd=parent, follow_symlinks=False)

    def listdir(self, relative: Relative | None = None) -> list[str]:
        """The names in a directory, sorted; in the base without a path."""
        with self.open_dir(relative) as directory:
            return sorted(os.listdir(directory))  # noqa: PTH208 - Path has none for a descriptor

    def mkdir(
        self,
        relative: Relative,
        *,
        mode: int = 0o770,
        uid: int = -1,
        gid: int = -1,
        parents: bool = False,
        parent_mode: int = 0o755,
        exist_ok: bool = False,
    ) -> bool:
        """Make a directory with exactly ``mode``, ``uid`` and ``gid``; whether it was made.

        The umask plays no part; -1 leaves an owner as it comes. A directory that is there is
        FileExistsError, or with ``exist_ok`` left exactly as it is; anything else is an error
        always. With ``parents``, missing ones are made with ``parent_mode``. It is 0700 until it
        has its owner, and stays so if we are killed between: who then finds it as unfinished work
        of their own calls ``chown`` and ``chmod``.
        """
        parts = check(relative)
        if parents:
            for depth in range(1, len(parts)):
                self._make(parts[:depth], parent_mode, (-1, -1), exist_ok=True)
        return self._make(parts, mode, (uid, gid), exist_ok=exist_ok)

    def _make(
        self, parts: tuple[str, ...], mode: int, owner: tuple[int, int], *, exist_ok: bool
    ) -> bool:
        with self._parent(parts) as (parent, name):
            try:
                os.mkdir(name, 0o700, dir_fd=parent)
            except FileExistsError:
                if exist_ok:
                    os.close(_open_step(name, parent, parts))  # a link or a file is refused
                    return False
                raise FileExistsError(errno.EEXIST, "there already", "/".join(parts)) from None
            directory = _open_step(name, parent, parts)
            try:
                if os.listdir(directory):  # noqa: PTH208
                    # Somebody moved another one here: its data must not get our owner.
                    raise FileExistsError(errno.EEXIST, "changed meanwhile", "/".join(parts))
                if owner != (-1, -1):
                    os.fchown(directory, *owner)
                os.fchmod(directory, mode)  # after chown, which may clear the set-gid bit
                sync_directory(directory)
            finally:
                os.close(directory)
            sync_directory(parent)
        return True

    def chown(self, relative: Relative, *, uid: int = -1, gid: int = -1) -> None:
        """Change the owner of a directory (not of what is in it); -1 leaves one as it is."""
        with self.open_dir(check(relative)) as directory:
            os.fchown(directory, uid, gid)
            sync_directory(directory)

    def chmod(self, relative: Relative, mode: int) -> None:
        """Change the mode of a directory (not of what is in it)."""
        with self.open_dir(check(relative)) as directory:
            os.fchmod(directory, mode)
            sync_directory(directory)

    def rename(
        self,
        source: Relative,
        target: Relative,
        *,
        to: Confined | None = None,
        replace: bool = False,
    ) -> None:
        """Move ``source`` to ``target``, below ``to`` if given (on the same file system).

        A link is moved, not followed. What is at the target is an error (FileExistsError), or with
        ``replace`` gives way if it is a file or an empty directory. Raises FileNotFoundError if
        there is no source or no directory for the target, OSError EXDEV across file systems.
        """
        old, new = check(source), check(target)
        with (
            self._parent(old) as (old_parent, old_name),
            (to or self)._parent(new) as (new_parent, new_name),
        ):
            try:
                if replace:
                    os.rename(old_name, new_name, src_dir_fd=old_parent, dst_dir_fd=new_parent)
                else:
                    _rename_noreplace(old_name, old_parent, new_name, new_parent)
            except OSError as error:
                error.filename, error.filename2 = "/".join(old), "/".join(new)
                raise
            # The new name first: after a power cut there may be both, never none.
            sync_directory(new_parent)
            sync_directory(old_parent)

    def remove_tree(
        self,
        relative: Relative,
        *,
        stop: Callable[[], bool] | None = None,
        failures: list[OSError] | None = None,
        counted: Callable[[int], None] = lambda _: None,
    ) -> bool:
        """Remove what is there with all that is in it; True when it is gone, and when it was.

        Links are removed, never followed. ``stop`` is asked before each entry: once it says True
        the rest stays and False is returned; call again to go on. Raises OSError EXDEV that names a
        mount point in the tree, nothing in that is touched; ENOTEMPTY if somebody keeps writing.

        With a list for ``failures`` all that can be removed is: what cannot is told there instead
        of raised, the first 100, each with its path as ``filename``, and False returned. At the end
        ``counted`` is told how many files and directories were removed.
        """
        parts = check(relative)
        try:
            with self._parent(parts) as (parent, name):
                removal = Removal(self.fileno(), stop, failures)
                try:
                    return removal.remove(name, parent, path="/".join(parts))
                finally:
                    sync_directory(parent)
                    counted(removal.removed)
        except FileNotFoundError:
            return True  # one of the parents is not there
        except Stopped:
            return False

    def remove_empty_parents(self, relative: Relative) -> None:
        """Remove the directories above ``relative``, from the lowest up, as long as they are empty.

        The base is never removed. What is not empty, a mount point or no directory ends it.
        """
        parts = check(relative)
        for depth in range(len(parts) - 1, 0, -1):
            try:
                with self._parent(parts[:depth]) as (parent, name):
                    os.rmdir(name, dir_fd=parent)
                    sync_directory(parent)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ENOTDIR):
                    return
                raise

    @contextmanager
    def _parent(self, parts: tuple[str, ...]) -> Iterator[tuple[int, str]]:
        """The directory that holds the last segment, and that segment."""
        directory = self._walk(parts[:-1])
        try:
            yield directory, parts[-1]
        finally:
            os.close(directory)

    def _walk(self, parts: tuple[str, ...]) -> int:
        if os.fstat(self.fileno()).st_nlink == 0:  # nothing can be said about what is below
            raise OSError(errno.ESTALE, "the base has been removed", str(self.base))
        # Opened anew instead of dup(): a listing must have a position of its own.
        current = os.open(".", _DIRECTORY, dir_fd=self.fileno())
        for depth, part in enumerate(parts, start=1):
            try:
                following = _open_step(part, current, parts[:depth])
            finally:
                os.close(current)
            current = following
        return current


def _open_step(name: str, parent: int, parts: tuple[str, ...]) -> int:
    try:
        return os.open(name, _DIRECTORY, dir_fd=parent)
    except OSError as error:
        error.filename = "/".join(parts)
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            text = "a link or no directory: links are not followed"
            raise NotADirectoryError(errno.ENOTDIR, text, error.filename) from None
        raise


def _rename_noreplace(old: str, old_parent: int, new: str, new_parent: int) -> None:
    try:
        _renameat2(old, old_parent, new, new_parent)
        return
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    # The file system cannot (NFS). A hard link never replaces anything; a directory has none, but
    # takes the place of an *empty* directory at worst.
    if not stat.S_ISDIR(os.stat(old, dir_fd=old_parent, follow_symlinks=False).st_mode):
        os.link(old, new, src_dir_fd=old_parent, dst_dir_fd=new_parent, follow_symlinks=False)
        os.unlink(old, dir_fd=old_parent)
        return
    try:
        os.stat(new, dir_fd=new_parent, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(old, new, src_dir_fd=old_parent, dst_dir_fd=new_parent)
        return
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def _renameat2(old: str, old_parent: int, new: str, new_parent: int) -> None:
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, "an older musl has no renameat2")
    names = os.fsencode(old), os.fsencode(new)
    if call(old_parent, names[0], new_parent, names[1], ctypes.c_uint(_RENAME_NOREPLACE)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
