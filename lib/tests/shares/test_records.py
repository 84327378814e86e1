"""Asset records that are on shares: after a crash, of several shares, of two replicas."""

from __future__ import annotations

import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from external_storage import assets
from external_storage.assets import AssetRecord, AssetState, DamagedRecord
from external_storage.errors import ProvisioningFailed
from external_storage.shares import (
    PRIVATE,
    Ending,
    JoinedRecords,
    Ownership,
    PathTaken,
    Share,
    ShareDirectories,
    ShareUnavailable,
)

from .conftest import Disk, Export, claim, until


def make(on: ShareDirectories, name: str = "pvc-1", path: str = "a/b", **options: Any) -> Any:
    return on.make(name, claim=claim(f"uid-of-{name}"), path=path, ownership=Ownership(), **options)


def files(export: Export, place: str) -> list[str]:
    return sorted(path.name for path in (export.point / PRIVATE / place).iterdir())


# -- on one share


def test_records_are_on_the_share_readable_by_us_alone(
    directories: ShareDirectories, export: Export
) -> None:
    make(directories)
    assert files(export, "records") == ["pvc-1.json"]
    assert stat.S_IMODE((export.point / PRIVATE).stat().st_mode) == 0o700
    assert stat.S_IMODE((export.point / PRIVATE / "records").stat().st_mode) == 0o700
    assert files(export, "records.tmp") == []


def test_another_replica_reads_them_when_it_takes_over(
    directories: ShareDirectories, export: Export
) -> None:
    """N29."""
    standby = export.directories()
    make(directories)
    make(directories, "pvc-2", "c")
    directories.records.publish("pvc-2")
    assert standby.records.all() == []
    standby.records.read_again()
    assert standby.records.all() == directories.records.all()
    assert standby.records.unfinished_claims() == ["uid-of-pvc-1"]
    assert standby.records.unfinished("uid-of-pvc-1") == directories.records.get("pvc-1")
    with pytest.raises(PathTaken):
        make(standby, "pvc-3", "c")


def test_a_delete_that_the_former_leader_began_is_ended_once(
    directories: ShareDirectories, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N29: it has moved the directory and not forgotten the record."""
    make(directories)
    directories.records.publish("pvc-1")
    monkeypatch.setattr(directories.records, "forget", lambda _name: None)
    directories.remove("pvc-1")
    leader = export.directories()
    assert leader.remove("pvc-1").ending is Ending.MISSING
    assert leader.records.all() == []
    make(leader, "pvc-2")


def test_a_share_whose_records_are_not_read_takes_no_claims(
    directories: ShareDirectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(directories)

    def fail() -> None:
        raise OSError("cannot be read")

    monkeypatch.setattr(directories.records._cache, "read_all", fail)
    directories.records.read_again()
    assert "cannot be read" in (directories.problem() or "")
    with pytest.raises(ShareUnavailable):
        make(directories, "pvc-2", "c")
    with pytest.raises(ShareUnavailable):
        directories.records.get("pvc-2")
    monkeypatch.undo()
    until(lambda: directories.problem() is None, "they are read after all")
    make(directories, "pvc-2", "c")


def test_a_damaged_record_is_told_and_what_it_is_about_left_alone(
    directories: ShareDirectories, export: Export
) -> None:
    make(directories)
    (export.point / PRIVATE / "records/pvc-1.json").write_text("{")
    directories.records.read_again()
    assert directories.records.all() == []
    with pytest.raises(DamagedRecord, match=r"records/pvc-1\.json"):
        directories.records.get("pvc-1")
    for call in (make, lambda on: on.remove("pvc-1"), lambda on: on.remove("pvc-1", path="a/b")):
        with pytest.raises(ProvisioningFailed, match="the record of the volume is damaged"):
            call(directories)
    assert (export.point / "a/b").is_dir()


def test_to_catch_up_only_what_has_changed_is_looked_at(
    directories: ShareDirectories, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done for every volume with a directory above it: the others must not cost each."""
    standby = export.directories()
    for number in range(10):
        make(directories, f"pvc-{number}", f"a/{number}")
        directories.records.publish(f"pvc-{number}")
    make(directories, "pvc-new", "b")
    standby.records.catch_up()
    decoded: list[str] = []
    decode = assets._decode

    def counted(data: bytes) -> AssetRecord:
        record = decode(data)
        decoded.append(record.name)
        return record

    monkeypatch.setattr(assets, "_decode", counted)
    directories.records.publish("pvc-new")
    directories.records.forget("pvc-1")
    make(directories, "pvc-newer", "c")
    decoded.clear()
    standby.records.catch_up()
    assert sorted(decoded) == ["pvc-new", "pvc-newer"]
    assert standby.records.unfinished_claims() == ["uid-of-pvc-newer"]
    assert standby.records.holders("a/1") == []
    assert standby.records.conflict("pvc-x", "c/below") is not None
    assert standby.records.all() == directories.records.all()


# -- of several shares


def test_the_records_of_a_share_that_hangs_hold_up_no_other(disk: Disk, export: Export) -> None:
    hanging, other = disk.directories("disk", call_limit_s=2.0), export.directories("files")
    joined = JoinedRecords([hanging.records, other.records])
    make(hanging)
    make(other, "pvc-2", "c")
    disk.freeze()
    with suppress(ShareUnavailable):
        make(hanging, "pvc-3", "d")
    joined.read_again()
    # What was read before counts, and the others can be changed.
    assert [record.name for record in joined.all()] == ["pvc-1", "pvc-2"]
    assert sorted(joined.unfinished_claims()) == ["uid-of-pvc-1", "uid-of-pvc-2"]
    assert joined.get("pvc-1") is not None
    until(lambda: other.problem() is None, "the other is read again")
    joined.publish("pvc-2")
    joined.publish("pvc-unknown")
    record = joined.get("pvc-2")
    assert record is not None
    assert record.state is AssetState.PUBLISHED
    joined.forget("pvc-2")
    for call in (joined.get, joined.forget):
        with pytest.raises(ShareUnavailable, match="records have not been read"):
            call("pvc-unknown")
    with pytest.raises(ShareUnavailable):
        joined.publish("pvc-1")
    assert joined.unfinished("uid-of-pvc-2") is None


def test_a_record_is_begun_on_the_share_that_its_details_name(export: Export) -> None:
    one = export.directories("one")
    joined = JoinedRecords([one.records])
    record = joined.begin("pvc-1", claim=claim(), details={"share": "one", "path": "a"})
    assert one.records.get("pvc-1") == record
    with pytest.raises(ValueError, match="'two': there are one"):
        joined.begin("pvc-1", claim=claim(), details={"share": "two"})


# -- crashes


class Crash(BaseException):
    """The process has ended."""


def crash_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Have the process end right after the n-th call on a share."""
    made: list[str] = []
    real = Share.call

    def counted(self: Share, function: Any, *args: Any) -> Any:
        made.append(function.__name__)
        result = real(self, function, *args)
        if len(made) == call:
            raise Crash
        return result

    monkeypatch.setattr(Share, "call", counted)


def crashed(export: Export, monkeypatch: pytest.MonkeyPatch, work: Any, *, call: int) -> bool:
    """Do the work in a life of its own that ends in the middle; whether it did."""
    life = export.directories()
    crash_at(monkeypatch, call)
    try:
        work(life)
    except Crash:
        return True
    else:
        return False
    finally:
        monkeypatch.undo()
        life.stop()


def discard_unfinished(on: ShareDirectories) -> None:
    for uid in on.records.unfinished_claims():
        record = on.records.unfinished(uid)
        assert isinstance(record, AssetRecord)
        on.discard(record)


def left(export: Export) -> list[Path]:
    """What is on the share besides our private directory, and what is begun in that."""
    found = [path for path in export.point.rglob("*") if PRIVATE not in path.parts]
    private = export.point / PRIVATE
    return found + [p for part in ("records", "new") for p in (private / part).iterdir()]


def test_after_a_crash_at_any_call_of_make_it_is_found_again_or_discarded(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in range(1, 20):
        if not crashed(export, monkeypatch, make, call=call):
            break
        again = export.directories()
        make(again)
        assert (export.point / "a/b").is_dir()
        # And a claim that is gone, of a try that crashed at the same call.
        again.remove("pvc-1")
        again.stop()
        crashed(export, monkeypatch, make, call=call)
        third = export.directories()
        discard_unfinished(third)
        third.tidy()
        assert left(export) == []
        third.stop()
    else:
        pytest.fail("it never came to its end")
    assert call > 3


@pytest.mark.parametrize("how", ["remove", "archive"])
def test_after_a_crash_at_any_call_of_a_delete_it_is_ended_once(
    export: Export, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for call in range(1, 20):
        first = export.directories()
        name = f"pvc-{call}"
        make(first, name)
        (export.point / "a/b/file").touch()
        first.records.publish(name)
        first.stop()
        ended = not crashed(export, monkeypatch, lambda on, n=name: getattr(on, how)(n), call=call)
        again = export.directories()
        getattr(again, how)(name)
        assert again.records.all() == []
        again.stop()
        archives = [path.name for path in export.point.iterdir() if path.name != PRIVATE]
        assert len(archives) == (call if how == "archive" else 0)
        if ended:
            break
    else:
        pytest.fail("it never came to its end")
    assert call > 2
