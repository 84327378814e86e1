"""Making a volume's directory: what is done in the share's process."""

from __future__ import annotations

import errno
import stat
from dataclasses import dataclass

from external_storage.confine import Confined
from external_storage.shares.layout import NEW, Site, opened

Parts = tuple[str, ...]

# Somebody removes the empty directories above while we make them: another replica, ending.
_TRIES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Ownership:
    """Of a directory that is made; -1 for an owner as the server gives it."""

    uid: int = -1
    gid: int = -1
    mode: int = 0o2770
    parent_mode: int = 0o755
    """Of missing directories above it."""


def inode_at(tree: Confined, parts: Parts) -> int | None:
    """The inode number of the directory there; None for nothing. NotADirectoryError."""
    try:
        facts = tree.stat(parts)
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(facts.st_mode):
        text = "a link or no directory: links are not followed"
        raise NotADirectoryError(errno.ENOTDIR, text, "/".join(parts))
    return facts.st_ino


def look(site: Site, parts: Parts) -> int | None:
    """``inode_at`` a path of the share."""
    with opened(site) as tree:
        return inode_at(tree, parts)


def prepare_new(site: Site, name: str, ownership: Ownership) -> int:
    """An empty directory in the private one, with owner and mode; its inode number.

    One that an earlier try has left there is taken.
    """
    parts = (*NEW, name)
    uid, gid, mode = ownership.uid, ownership.gid, ownership.mode
    with opened(site) as tree:
        if not tree.mkdir(parts, mode=mode, uid=uid, gid=gid, exist_ok=True):
            if (uid, gid) != (-1, -1):
                tree.chown(parts, uid=uid, gid=gid)
            tree.chmod(parts, mode)
        return tree.stat(parts).st_ino


def place(site: Site, name: str, parts: Parts, parent_mode: int) -> bool:
    """Give the new directory its place, in one step; False if something else is there."""
    new = (*NEW, name)
    with opened(site) as tree:
        for _ in range(_TRIES):
            if len(parts) > 1:
                tree.mkdir(
                    parts[:-1],
                    mode=parent_mode,
                    parents=True,
                    parent_mode=parent_mode,
                    exist_ok=True,
                )
            try:
                tree.rename(new, parts)
            except FileNotFoundError:
                tree.stat(new)  # raises if it is this one that is gone
                continue
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                    tree.remove_tree(new)
                    return False
                raise
            return True
    text = "the directories above it are removed again and again"
    raise FileNotFoundError(errno.ENOENT, text, "/".join(parts))


def drop_new(site: Site, name: str) -> None:
    """Remove the directory that has not got its place; none is a success."""
    with opened(site) as tree:
        tree.remove_tree((*NEW, name))
