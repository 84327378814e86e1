"""A group of its own for each volume of a class with ``gid: auto``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from external_storage import AssetRecord, Change, PersistentVolume, ProvisioningFailed
from external_storage.gid_allocator import GidAllocator, GidsExhausted

GID: Final = "gid"
"""Key of a record's details: the group that the directory was begun with."""


class Groups:
    """The groups of all volumes of all servers; safe to use from threads."""

    def __init__(self) -> None:
        self._allocator = GidAllocator()

    def observe(self, old: PersistentVolume | None, new: PersistentVolume | None) -> None:
        """A volume of the cluster has come, changed or gone."""
        self._allocator.observe(Change(old, new))

    @contextmanager
    def reserve(
        self, name: str, *, begun: Iterable[AssetRecord], minimum: int, maximum: int
    ) -> Iterator[int]:
        """The group of the volume ``name``; a fresh one is given back if the block raises.

        ``begun``: records of volumes that are not saved yet. Theirs are known from nowhere else
        after a restart, and are taken first.
        """
        for record in begun:
            gid = begun_gid(record.details)
            if gid is not None and self._allocator.minimum <= gid <= self._allocator.maximum:
                self._allocator.take(record.name, gid)
        try:
            with self._allocator.reserve(name, minimum=minimum, maximum=maximum) as gid:
                yield gid
        except GidsExhausted as error:
            raise ProvisioningFailed(str(error)) from error

    def release(self, name: str) -> None:
        """The volume's directory is gone, or not of its own group after all."""
        self._allocator.release(name)


def begun_gid(details: Mapping[str, Any]) -> int | None:
    """The group in the details of a record, which may be damaged."""
    gid = details.get(GID)
    return gid if isinstance(gid, int) and not isinstance(gid, bool) and gid > 0 else None
