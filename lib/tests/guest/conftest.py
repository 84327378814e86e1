"""What the tests of the guest share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from external_storage.testing import Disk, Guest

MIB = 1024**2


@pytest.fixture
def add_disk(guest: Guest) -> Iterator[Callable[..., Disk]]:
    """``Guest.add_disk`` of the shared guest, for disks that are removed after the test."""
    with ExitStack() as removals:

        def add(size: int = 64 * MIB, **options: object) -> Disk:
            disk = guest.add_disk(size, **options)  # type: ignore[arg-type]
            removals.callback(remove, disk)
            return disk

        def remove(disk: Disk) -> None:
            if disk.file.exists():
                guest.remove_disk(disk)

        yield add
