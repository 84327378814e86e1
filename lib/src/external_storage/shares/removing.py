"""Taking a volume's directory away: what is done in the share's process."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from external_storage.confine import Confined
from external_storage.durable import sync_directory
from external_storage.shares.layout import (
    ARCHIVES,
    NEW,
    RECORDS_STAGING,
    TRASH,
    Site,
    is_probe,
    opened,
)
from external_storage.shares.making import Parts, inode_at
from external_storage.shares.record_files import SUFFIX, read_file, write_file

_MAX_NAME_BYTES = 255
_MAX_VOLUME_NAME = 200  # in a name of the trash: the random part must fit, too


def to_trash(site: Site, name: str, parts: Parts, inode: int | None = None) -> bool:
    """Move the directory at the path to the trash, and remove the empty ones above it.

    With ``inode`` only that very directory. False if nothing, or not that, is there.
    """
    with opened(site) as tree:
        there = inode_at(tree, parts)
        found = there is not None and inode in (None, there)
        if found:
            _trash(tree, name, parts)
        if found or there is None:
            tree.remove_empty_parents(parts)
        return found


def remove_empty(site: Site, parts: Parts) -> bool:
    """Remove the directory if nothing is in it, and the empty ones above; whether it is gone."""
    with opened(site) as tree:
        try:
            with tree.open_dir(parts[:-1] or None) as parent:
                os.rmdir(parts[-1], dir_fd=parent)
                sync_directory(parent)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        tree.remove_empty_parents(parts)
        return True


def sweep(site: Site, known: Collection[str], before: Collection[str]) -> set[str]:
    """Remove what crashes have left in the private directory: what was there ``before`` as well
    and has no record that is ``known``. What is left, for the next time's ``before``."""
    left = set()
    with opened(site) as tree:
        for place in (NEW, RECORDS_STAGING):
            for entry in tree.listdir(place):
                if place == NEW and entry in known:
                    continue
                text = f"{place[-1]}/{entry}"
                if text in before:
                    tree.remove_tree((*place, entry))
                else:
                    left.add(text)
        left |= _sweep_probes(tree, before)
    return left


def _sweep_probes(tree: Confined, before: Collection[str]) -> set[str]:
    """Of ``prepare``, which was killed; what has something in it is somebody else's."""
    left = set()
    for entry in tree.listdir():
        if not is_probe(entry):
            continue
        if entry not in before:
            left.add(entry)
            continue
        with suppress(OSError):
            os.rmdir(entry, dir_fd=tree.fileno())
    return left


# -- archives


class _Archive(msgspec.Struct, frozen=True, kw_only=True):
    """The file of one archived directory; it has the volume's name."""

    volume: str
    path: str
    """Where it was."""
    place: str
    """Where it is."""
    inode: int
    archived_at: float
    """Seconds since 1970, by our clock."""
    expires_at: float | None


# Worked out once and now: see kube/decoding.py for why not by the first thread that comes.
_decode = msgspec.json.Decoder(_Archive).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Expired:
    """What ``expire`` did, by place."""

    removed: tuple[str, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    """Places that are left alone, and why."""


def archive(site: Site, name: str, parts: Parts, now: float, keep_s: float | None) -> str | None:
    """Rename the directory to a new name right below the base; that name, or None if it is gone.

    The name is written down first, so that another try after a crash finds what has been done.
    """
    with opened(site) as tree:
        there = inode_at(tree, parts)
        known = _read_archive(tree, name)
        if known is not None and there != known.inode:
            return known.place
        if there is None:
            return None
        stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
        for suffix in (stamp, f"{stamp}-{secrets.token_hex(4)}"):
            place = _archive_name(parts, name, suffix)
            entry = _Archive(
                volume=name,
                path="/".join(parts),
                place=place,
                inode=there,
                archived_at=now,
                expires_at=None if keep_s is None else now + keep_s,
            )
            _write_archive(tree, entry)
            try:
                tree.rename(parts, (place,))
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and suffix == stamp:
                    continue  # somebody has put something there
                _forget_archive(tree, name)
                raise
            tree.remove_empty_parents(parts)
            return place
    raise AssertionError("unreachable")


def expire(site: Site, now: float, taken: Collection[str]) -> Expired:
    """Move archives whose time is over to the trash: only what we have archived ourselves.

    ``taken`` are first segments of the paths of volumes: an archive that has one in it is kept.
    """
    removed, kept = [], []
    with opened(site) as tree:
        for file in tree.listdir(ARCHIVES):
            try:
                place, reason = _expire(tree, file.removesuffix(SUFFIX), now, taken)
            except (msgspec.DecodeError, ValueError, NotADirectoryError) as error:
                place, reason = f"{'/'.join(ARCHIVES)}/{file}", f"it cannot be read: {error}"
            if reason:
                kept.append((place, reason))
            elif place:
                removed.append(place)
    return Expired(removed=tuple(removed), kept=tuple(kept))


def _expire(
    tree: Confined, name: str, now: float, taken: Collection[str]
) -> tuple[str, str | None]:
    """The place of an archive whose time is over, and why it is kept; none for all others."""
    entry = _read_archive(tree, name)
    if entry is None or entry.expires_at is None or entry.expires_at > now:
        return "", None
    if entry.place in taken:
        return entry.place, "a volume is in it"
    there = inode_at(tree, (entry.place,))
    if there == entry.inode:
        _trash(tree, name, (entry.place,))
    _forget_archive(tree, name)
    if there is None:
        return "", None
    return entry.place, None if there == entry.inode else "it is not what was archived: now yours"


def _trash(tree: Confined, name: str, parts: Parts) -> None:
    tree.rename(parts, (*TRASH, f"{name[:_MAX_VOLUME_NAME]}.{secrets.token_hex(8)}"))


def _archive_name(parts: Parts, name: str, suffix: str) -> str:
    flat, name = "-".join(parts), name[:_MAX_VOLUME_NAME]
    # The default directory name ends with the volume's already.
    end = f"-{suffix}" if flat.endswith(name) else f"-{name}-{suffix}"
    start = f"archived-{flat}".encode()[: _MAX_NAME_BYTES - len(end.encode())]
    return start.decode(errors="ignore") + end


def _read_archive(tree: Confined, name: str) -> _Archive | None:
    with tree.open_dir(ARCHIVES) as directory, suppress(FileNotFoundError):
        entry: Any = _decode(read_file(directory, name + SUFFIX))
        return entry  # type: ignore[no-any-return]
    return None


def _write_archive(tree: Confined, entry: _Archive) -> None:
    with tree.open_dir(ARCHIVES) as directory, tree.open_dir(RECORDS_STAGING) as staging:
        data = msgspec.json.encode(entry)
        write_file(directory, f"{entry.volume}{SUFFIX}", data=data, staging=staging)


def _forget_archive(tree: Confined, name: str) -> None:
    tree.remove_tree((*ARCHIVES, name + SUFFIX))
