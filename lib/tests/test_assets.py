"""Asset records."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_storage.assets import AssetRecord, AssetRecords, AssetState, DamagedRecord
from external_storage.testing import builders

GOOD = b'{"name":"pvc-1","state":"published","owner":"o","claim_uid":"u"}'


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state" / "records"


@pytest.fixture
def records(directory: Path) -> AssetRecords:
    return AssetRecords(directory)


def begin(records: AssetRecords, name: str = "pvc-1") -> AssetRecord:
    return records.begin(
        name, claim=builders.claim(uid="uid"), owner="node-1", details={"export": 7}
    )


def test_a_record_is_provisioning_from_its_beginning(records: AssetRecords) -> None:
    record = begin(records)
    assert record.state is AssetState.PROVISIONING
    assert records.get("pvc-1") == record


def test_a_published_record_keeps_what_it_said(records: AssetRecords) -> None:
    before = begin(records)
    records.publish("pvc-1")
    after = records.get("pvc-1")
    assert after is not None
    assert after.state is AssetState.PUBLISHED
    assert (after.owner, after.claim_uid, after.details) == (
        before.owner,
        before.claim_uid,
        before.details,
    )


def test_records_are_there_after_a_restart(records: AssetRecords, directory: Path) -> None:
    begin(records)
    records.publish("pvc-1")
    assert AssetRecords(directory).all() == records.all()


def test_begin_replaces_an_earlier_record(records: AssetRecords) -> None:
    begin(records)
    records.publish("pvc-1")
    record = records.begin("pvc-1", claim=builders.claim(uid="other"), owner="node-2")
    assert records.all() == [record]


def test_publish_of_nothing_and_of_a_published_record_have_no_effect(
    records: AssetRecords, directory: Path
) -> None:
    records.publish("pvc-1")
    assert records.all() == []
    begin(records)
    records.publish("pvc-1")
    before = (directory / "pvc-1.json").stat().st_ino
    records.publish("pvc-1")
    assert (directory / "pvc-1.json").stat().st_ino == before


def test_forget_of_a_missing_record_is_a_success(records: AssetRecords) -> None:
    begin(records)
    records.forget("pvc-1")
    records.forget("pvc-1")
    assert records.get("pvc-1") is None


def test_all_is_sorted_by_name(records: AssetRecords) -> None:
    for name in ("pvc-b", "pvc-c", "pvc-a"):
        begin(records, name)
    assert [record.name for record in records.all()] == ["pvc-a", "pvc-b", "pvc-c"]


def test_the_directories_are_readable_by_us_alone(records: AssetRecords, directory: Path) -> None:
    for path in (directory, directory.with_name("records.tmp")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_what_a_crash_left_half_written_is_removed_and_never_read(directory: Path) -> None:
    temporary = directory.with_name("records.tmp")
    temporary.mkdir(parents=True)
    half = temporary / "pvc-1.json"
    half.write_bytes(GOOD[:20])
    first = AssetRecords(directory)
    assert first.all() == []
    assert not half.exists()
    # While somebody is at work there, it may be theirs.
    half.write_bytes(GOOD[:20])
    second = AssetRecords(directory)
    assert second.all() == []
    assert half.exists()
    del first, second
    assert AssetRecords(directory).all() == []
    assert not half.exists()


def test_a_record_is_on_disk_before_its_method_returns(
    records: AssetRecords, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file before it gets its name, the directory after that."""
    synced: list[tuple[str, bool]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path.name, (directory / "pvc-1.json").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    begin(records)
    assert synced == [("pvc-1.json", False), ("records", True)]
    synced.clear()
    records.forget("pvc-1")
    assert synced == [("records", False)]


def test_a_new_directory_is_on_disk_before_its_first_record(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power loss takes the directory along, with every record that was synced in it."""
    synced: list[Path] = []
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append(Path(f"/proc/self/fd/{number}").readlink())
    )
    AssetRecords(directory)
    assert directory.parent in synced


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD[:-1],
        b"[]",
        GOOD.replace(b"published", b"lost"),
        GOOD.replace(b'"owner":"o",', b""),
        GOOD.replace(b"pvc-1", b"pvc-2"),
    ],
)
def test_a_damaged_record_is_told_and_left_alone(
    records: AssetRecords, directory: Path, data: bytes
) -> None:
    path = directory / "pvc-1.json"
    path.write_bytes(data)
    begin(records, "pvc-3")
    with pytest.raises(DamagedRecord, match=str(path)):
        records.get("pvc-1")
    assert [record.name for record in records.all()] == ["pvc-3"]
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "data",
    [
        GOOD.replace(b"pvc-1", b"\xff"),
        GOOD[:-1] + b',"details":{"a":' + b"[" * 100_000,
    ],
    ids=["no UTF-8", "too deep"],
)
def test_a_record_with_damaged_bytes_is_a_damaged_record(
    records: AssetRecords, directory: Path, data: bytes
) -> None:
    (directory / "pvc-1.json").write_bytes(data)
    with pytest.raises(DamagedRecord):
        records.get("pvc-1")


def test_other_files_are_not_taken_for_records(records: AssetRecords, directory: Path) -> None:
    (directory / "README").write_text("hello")
    (directory / "UPPER.json").write_bytes(GOOD)
    assert records.all() == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\0b", "A", "-a", "a-", "a\n", "a" * 254]
)
def test_what_is_no_volume_name_is_never_made_a_path(records: AssetRecords, name: str) -> None:
    for call in (records.get, records.publish, records.forget):
        with pytest.raises(ValueError, match="is not a volume name"):
            call(name)
    with pytest.raises(ValueError, match="is not a volume name"):
        begin(records, name)


def test_the_longest_volume_name_has_a_record(records: AssetRecords) -> None:
    begin(records, "a" * 250)
    assert len(records.all()) == 1
    with pytest.raises(ValueError, match="at most 250"):
        begin(records, "a" * 251)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.text(), JSON, max_size=3))
def test_details_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, details: dict[str, object]
) -> None:
    records = AssetRecords(tmp_path_factory.getbasetemp() / "shared" / "records")
    written = records.begin("pvc-1", claim=builders.claim(uid="u"), owner="o", details=details)
    assert records.get("pvc-1") == written
