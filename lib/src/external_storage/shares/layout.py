"""What is where on a share, and the private directory that no volume can be in.

::

    <base>/.external-storage/       mode 0700, ours
        records/  records.tmp/      one file for each volume; half-written ones
        new/                        directories that have not got their place yet
        trash/                      directories to be removed
        archives/                   one file for each archived directory
    <base>/archived-...             archived directories, where people look for them
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from string import hexdigits

from external_storage import confine
from external_storage.confine import Confined
from external_storage.shares.location import Expected, WrongMount

PRIVATE = ".external-storage"
"""The name below the base that is ours alone."""
RECORDS = (PRIVATE, "records")
RECORDS_STAGING = (PRIVATE, "records.tmp")
NEW = (PRIVATE, "new")
TRASH = (PRIVATE, "trash")
ARCHIVES = (PRIVATE, "archives")
_PROBE = f"{PRIVATE}."


def check_path(path: str) -> tuple[str, ...]:
    """The segments of a volume's path below the base; ValueError says what is wrong with it.

    Besides what ``confine.check`` refuses, the first segment must not be the private directory's
    name, or a probe's, in whatever case: the server may not tell the cases apart.
    """
    parts = confine.check(path)
    if parts[0].casefold() == PRIVATE or is_probe(parts[0].casefold()):
        raise ValueError(f"{path!r:.120}: the name {parts[0]} is reserved")
    return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What a worker has to know of a share; it is sent along with every call."""

    base: Path
    expected: Expected
    our_uid: int | None = None
    """Who owns what we make there: not us where the server maps root to another user."""


@contextmanager
def opened(site: Site) -> Iterator[Confined]:
    """The share's directory, if it is the expected mount; ``WrongMount``, OSError.

    Nothing below it is touched before that is certain.
    """
    try:
        base = Confined(site.base)
    except OSError as error:
        raise WrongMount(f"{site.base} cannot be opened: {error.strerror}") from error
    with base as tree:
        site.expected.verify(tree.fileno())
        if site.our_uid is not None:
            _refuse_foreign(tree, site.our_uid)
        yield tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a look at a share has found."""

    our_uid: int
    size: int
    """Bytes of the file system, by the server's word."""
    free: int
    """Bytes that can still be written."""
    trash: int
    """Directories that wait to be removed."""


def prepare(site: Site) -> Facts:
    """Make the private directory where it is missing, and see whether all can be worked with.

    Raises WrongMount for what nobody can work with, OSError.
    """
    with opened(replace(site, our_uid=None)) as tree:
        made = tree.mkdir(PRIVATE, mode=0o700, exist_ok=True)
        owner = tree.stat(PRIVATE).st_uid
        known = owner in (os.geteuid(), site.our_uid)
        ours = owner if made or known else _uid_we_get(tree)
        _refuse_foreign(tree, ours)
        for part in (RECORDS, RECORDS_STAGING, NEW, TRASH, ARCHIVES):
            tree.mkdir(part, mode=0o700, exist_ok=True)
        with tree.open_dir(PRIVATE) as private:
            # A server that has it read-only, or hangs, does so at the first change only.
            os.utime(private)
        space = os.statvfs(tree.fileno())
        return Facts(
            our_uid=ours,
            size=space.f_blocks * space.f_frsize,
            free=space.f_bavail * space.f_frsize,
            trash=len(tree.listdir(TRASH)),
        )


def is_probe(name: str) -> bool:
    """Whether a name at the base is one of those made to see whom the server takes us for."""
    digits = name.removeprefix(_PROBE)
    return name != digits and len(digits) == 16 and set(digits) <= set(hexdigits)


def _uid_we_get(tree: Confined) -> int:
    """As whom the server lets us work: the owner of what we make, not who we are here."""
    name = f"{_PROBE}{secrets.token_hex(8)}"
    tree.mkdir(name, mode=0o700)
    try:
        return tree.stat(name).st_uid
    finally:
        tree.remove_tree(name)


def _refuse_foreign(tree: Confined, uid: int) -> None:
    with tree.open_dir(PRIVATE) as private:
        facts = os.fstat(private)
    if facts.st_uid != uid:
        raise WrongMount(
            f"{tree.base / PRIVATE} belongs to uid {facts.st_uid}, want {uid}: somebody else made "
            "it and could forge what is in it; remove it, or give it to that user"
        )
    if stat.S_IMODE(facts.st_mode) & 0o077:
        raise WrongMount(
            f"{tree.base / PRIVATE} has mode {stat.S_IMODE(facts.st_mode):04o}, want 0700: others "
            "could read and forge what is in it"
        )
