"""Record files on a share: what is done with them in its process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from external_storage.durable import sync_directory
from external_storage.shares.layout import RECORDS, RECORDS_STAGING, Site, opened

SUFFIX = ".json"
# Each is some hundred bytes; more is damage, and must not fill our memory.
_MAX_BYTES = 1 << 20


def names(site: Site) -> list[str]:
    """Of all records, sorted."""
    with opened(site) as tree:
        found = tree.listdir(RECORDS)
    return [name.removesuffix(SUFFIX) for name in found if name.endswith(SUFFIX)]


def read(site: Site, wanted: Sequence[str]) -> dict[str, bytes]:
    """The files of these names that are there."""
    found = {}
    with opened(site) as tree, tree.open_dir(RECORDS) as directory:
        for name in wanted:
            with suppress(FileNotFoundError):
                found[name] = read_file(directory, name + SUFFIX)
    return found


def write(site: Site, name: str, data: bytes) -> None:
    """Make the record hold ``data``; on the server's disk when it returns."""
    with (
        opened(site) as tree,
        tree.open_dir(RECORDS) as directory,
        tree.open_dir(RECORDS_STAGING) as staging,
    ):
        write_file(directory, name + SUFFIX, data=data, staging=staging)


def unlink(site: Site, name: str) -> None:
    """Remove the record; a missing one is a success."""
    with opened(site) as tree, tree.open_dir(RECORDS) as directory:
        with suppress(FileNotFoundError):
            os.unlink(name + SUFFIX, dir_fd=directory)
        sync_directory(directory)


def read_file(directory: int, name: str) -> bytes:
    """A small file of an open directory; FileNotFoundError."""
    with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory), "rb") as file:
        return file.read(_MAX_BYTES)


def write_file(directory: int, name: str, *, data: bytes, staging: int) -> None:
    """As ``durable.replace_file``, by open directories; ``staging`` on the same file system."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=staging)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(name, flags, 0o600, dir_fd=staging), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(name, name, src_dir_fd=staging, dst_dir_fd=directory)
    sync_directory(directory)
