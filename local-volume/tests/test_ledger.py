"""What the node remembers is there after everything, or the agent does not start."""

from __future__ import annotations

import sqlite3
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from external_storage import CannotStart
from local_volume_provisioner import identity
from local_volume_provisioner.config import ClassConfig
from local_volume_provisioner.ledger import Ledger, Record, SavedClass, Use

CONFIG = ClassConfig(name="c", host_dir="/d", mount_dir="/d")


def record(use: Use, **fields: Any) -> Record:
    kind = SavedClass.of(CONFIG)
    disk = identity.Identity(kind="device")
    return Record(path=f"/d/{use}", saved_class=kind, use=use, identity=disk, **fields)


def test_the_records_survive(tmp_path: Path) -> None:
    with ExitStack() as stack:
        ledger = Ledger(tmp_path)
        stack.callback(ledger.close)
        config = ClassConfig(name="c", host_dir="/d", mount_dir="/d")
        record = Record(
            path="/d/a",
            saved_class=SavedClass.of(config),
            use=Use.USED,
            identity=identity.Identity(kind="device"),
        )
        ledger.write([record])
        with pytest.raises(CannotStart, match=r"ledger\.db"):
            Ledger(tmp_path)
    again = Ledger(tmp_path)
    assert again.all() == [record]
    again.move("/d/a", "/d/b")
    assert [r.path for r in again.all()] == ["/d/b"]
    again.close()
    (tmp_path / "ledger.db").write_bytes(b"no database " * 1000)
    with pytest.raises(CannotStart, match="cannot be used"):
        Ledger(tmp_path)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A ledger with one record of each use, half wiped where that can be."""
    ledger = Ledger(tmp_path)
    ledger.write(record(use, claim="c1", bytes_done=1, method="zero") for use in Use)
    ledger.close()
    return tmp_path


def uses(directory: Path) -> dict[str, Use]:
    ledger = Ledger(directory)
    found = {found.path.removeprefix("/d/"): found.use for found in ledger.all()}
    ledger.close()
    return found


def test_what_counts_only_as_long_as_somebody_watches(written: Path) -> None:
    """After a restart nobody knows whether a volume was created, used and deleted by hand."""
    ledger = Ledger(written)
    offering = ledger.get("/d/offering")
    assert offering is not None
    assert offering.use is Use.OFFERED
    half = ledger.get("/d/cleaning")
    assert half is not None
    assert half.bytes_done == 1
    ledger.write([msgspec.structs.replace(half, claim="")])
    ledger.close()
    ledger = Ledger(written)
    half = ledger.get("/d/cleaning")
    assert half is not None
    assert half.bytes_done == 0
    ledger.close()


def test_a_ledger_of_the_first_format_is_never_taken_for_clean(written: Path) -> None:
    database = sqlite3.connect(written / "ledger.db")
    database.execute("PRAGMA user_version = 0")
    database.execute("UPDATE records SET body = json_remove(body, '$.claim')")
    database.close()
    found = uses(written)
    assert found == uses(written)
    assert found == {
        "offering": Use.OFFERED,
        "offered": Use.OFFERED,
        "clean": Use.OFFERED,
        "used": Use.USED,
        "cleaning": Use.USED,
        "retired": Use.RETIRED,
    }


def test_a_ledger_of_a_later_format_is_not_touched(written: Path) -> None:
    database = sqlite3.connect(written / "ledger.db")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(CannotStart, match="later version"):
        Ledger(written)


def test_nothing_replaces_what_it_has_not_seen(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    one, other = record(Use.USED), record(Use.USED, policy="Retain")
    assert ledger.swap(None, one, one.path)
    assert not ledger.swap(None, other, one.path)
    assert not ledger.swap(other, None, one.path)
    assert ledger.swap(one, other, one.path)
    assert ledger.swap(other, None, one.path)
    assert ledger.all() == []
    ledger.close()
