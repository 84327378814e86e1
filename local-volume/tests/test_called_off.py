"""A wipe counts only for what it was begun for: what changes meanwhile calls it off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from local_volume_provisioner.cleaning.guard import DeviceTask, Refused, exclusively
from local_volume_provisioner.cleaning.machine import Cleaner, Limits, Stopped
from local_volume_provisioner.config import ClassConfig, VolumeMode
from local_volume_provisioner.ledger import Ledger, Use
from local_volume_provisioner.methods import Method, MethodKind
from local_volume_provisioner.mounts import MountTable
from local_volume_provisioner.scan import Candidate, Scanner

MIB = 1 << 20
SECRET = b"somebody's data " * 65536


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "state")
    yield made
    made.close()


@pytest.fixture
def cleaner(ledger: Ledger, tmp_path: Path) -> Cleaner:
    return Cleaner(ledger, Limits(step_s=60.0, command_s=60.0), str(tmp_path / "run"))


@pytest.fixture
def found(tmp_path: Path) -> Callable[..., Candidate]:
    """The candidate for a link to this disk."""

    def make(path: str, **fields: Any) -> Candidate:
        (tmp_path / "disk").symlink_to(path)
        where: dict[str, Any] = {"host_dir": str(tmp_path), "mount_dir": str(tmp_path)}
        config = ClassConfig(name="c", mode=VolumeMode.BLOCK, **where, **fields)
        candidate = Scanner().look(config, "disk", MountTable.read())
        assert isinstance(candidate, Candidate), candidate
        return candidate

    return make


def clean(cleaner: Cleaner, candidate: Candidate, **kwargs: Any) -> None:
    kwargs = {"uid": "u1", "claim": "c1", "wanted": lambda: True, **kwargs}
    cleaner.clean(candidate, candidate.class_config, **kwargs)


def task(candidate: Candidate) -> DeviceTask:
    return DeviceTask(candidate.mount_path, candidate.number, candidate.identity)


def test_a_command_is_killed_when_it_is_called_off(
    disks: Any, found: Callable[..., Candidate], cleaner: Cleaner, tmp_path: Path
) -> None:
    """It has no steps, and may take days: the volume may be back in service long before."""
    begun = tmp_path / "begun"
    method = Method(MethodKind.COMMAND, 1, ("sh", "-c", f"touch {begun}; exec sleep 1000"))
    disk = disks.disk("a", data=SECRET)
    with pytest.raises(Stopped):
        clean(cleaner, found(disk.path, method=method), wanted=lambda: not begun.exists())


def test_what_is_written_down_meanwhile_calls_a_wipe_off(
    disks: Any, found: Callable[..., Candidate], cleaner: Cleaner, ledger: Ledger
) -> None:
    """Somebody has a volume of it again, or has had it offered as it is."""
    disk = disks.disk("a", data=SECRET)
    candidate = found(disk.path)

    def used() -> bool:
        ledger.write([msgspec.structs.replace(r, use=Use.USED) for r in ledger.all()])
        return True

    with pytest.raises(Stopped):
        clean(cleaner, candidate, wanted=used)
    assert ledger.all()[0].use is Use.USED
    known = ledger.all()[0]
    ledger.forget(candidate.path)
    with pytest.raises(Stopped):
        clean(cleaner, candidate, known=known)
    assert ledger.all() == []


def test_what_is_refused_is_as_dirty_as_before(
    disks: Any, found: Callable[..., Candidate], cleaner: Cleaner, ledger: Ledger
) -> None:
    """A wipe that has not begun does not count as one: the brake still holds it."""
    disk = disks.disk("a", data=SECRET)
    candidate = found(disk.path)
    with exclusively(task(candidate)), pytest.raises(Refused):
        clean(cleaner, candidate)
    assert ledger.all() == []


@pytest.mark.parametrize("claim", ["c2", ""])
def test_progress_counts_for_one_release_only(
    claim: str, disks: Any, found: Callable[..., Candidate], cleaner: Cleaner, ledger: Ledger
) -> None:
    """Half wiped, taken back into service, written to, released again: the same volume still."""
    disk = disks.disk("a", data=SECRET)
    candidate = found(disk.path, method=Method.parse("overwrite:1"))
    clean(cleaner, candidate)
    (record,) = ledger.all()
    half = {"use": Use.CLEANING, "method": "overwrite:1", "bytes_done": 8 * MIB}
    ledger.write([msgspec.structs.replace(record, **half)])
    disk.write(SECRET)
    clean(cleaner, candidate, claim=claim)
    assert disk.is_blank()
