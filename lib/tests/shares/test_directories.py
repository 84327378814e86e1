"""Volumes' directories: made, found again, shared, removed, archived, kept."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from external_storage.assets import AssetState
from external_storage.errors import ProvisioningFailed
from external_storage.shares import (
    PRIVATE,
    DirectoryRefused,
    Ending,
    Ownership,
    PathTaken,
    ShareDirectories,
)

from .conftest import Export, claim, run, until

GROUP = Ownership(gid=4711, mode=0o2770)


def make(on: ShareDirectories, name: str = "pvc-1", path: str = "ns/data", **options: Any) -> Any:
    options.setdefault("ownership", GROUP)
    options.setdefault("claim", claim(f"uid-of-{name}"))
    return on.make(name, path=path, **options)


def facts(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid


def trash(export: Export) -> list[Path]:
    return sorted((export.point / PRIVATE / "trash").iterdir())


# -- make


def test_a_directory_has_its_owner_and_mode_and_its_parents_have_theirs(
    directories: ShareDirectories, export: Export
) -> None:
    made = make(directories, ownership=Ownership(uid=12, gid=34, mode=0o2711, parent_mode=0o751))
    assert facts(export.point / "ns/data") == (0o2711, 12, 34)
    assert facts(export.point / "ns") == (0o751, 0, 0)
    assert (made.path, made.server_path, made.adopted) == (
        "ns/data",
        "/exports/data/ns/data",
        False,
    )
    assert list((export.point / "ns/data").iterdir()) == []
    assert list((export.point / PRIVATE / "new").iterdir()) == []


def test_a_second_call_finds_what_the_first_has_made(
    directories: ShareDirectories, export: Export
) -> None:
    first = make(directories)
    inode = (export.point / "ns/data").stat().st_ino
    assert make(directories) == first
    assert (export.point / "ns/data").stat().st_ino == inode


def test_the_record_says_where_it_is_and_keeps_what_the_caller_adds(
    directories: ShareDirectories,
) -> None:
    make(directories, details={"policy": "archive"})
    record = directories.records.get("pvc-1")
    assert record is not None
    assert record.state is AssetState.PROVISIONING
    assert record.owner == "cluster-1/example.com/test"
    assert record.details["path"] == "ns/data"
    assert record.details["share"] == "files"
    assert record.details["policy"] == "archive"
    with pytest.raises(ValueError, match="path"):
        make(directories, "pvc-2", details={"path": "elsewhere"})


def test_a_directory_that_is_there_is_refused_and_nothing_is_left_begun(
    directories: ShareDirectories, export: Export
) -> None:
    """N20."""
    (export.point / "ns/data").mkdir(parents=True, mode=0o705)
    for _ in range(2):  # a second try must not take the first one's record for its own work
        with pytest.raises(DirectoryRefused, match="ns/data that was not made for this volume"):
            make(directories)
        assert directories.records.all() == []
        assert facts(export.point / "ns/data") == (0o705, 0, 0)


def test_a_directory_that_comes_while_ours_is_made_is_refused(
    directories: ShareDirectories, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = directories.records.begin

    def begin_late(*args: Any, **kwargs: Any) -> Any:
        (export.point / "ns/data").mkdir(parents=True)
        (export.point / "ns/data/theirs").touch()
        return begin(*args, **kwargs)

    monkeypatch.setattr(directories.records, "begin", begin_late)
    with pytest.raises(DirectoryRefused):
        make(directories)
    assert directories.records.all() == []
    assert (export.point / "ns/data/theirs").exists()
    assert list((export.point / PRIVATE / "new").iterdir()) == []


def test_a_directory_is_adopted_when_told_with_owner_and_mode_untouched(
    directories: ShareDirectories, export: Export
) -> None:
    """N20."""
    (export.point / "ns/data").mkdir(parents=True, mode=0o705)
    (export.point / "ns/data/file").touch()
    assert make(directories, adopt=True).adopted
    assert make(directories, adopt=True).adopted
    assert facts(export.point / "ns/data") == (0o705, 0, 0)


def test_a_path_that_changes_between_two_tries_moves_the_directory(
    directories: ShareDirectories, export: Export
) -> None:
    """A pattern that depends on a label, and the label changed."""
    make(directories, path="old/data")
    assert make(directories, path="new/data").path == "new/data"
    assert sorted(path.name for path in export.point.iterdir()) == [PRIVATE, "new"]


def test_the_path_of_a_published_volume_does_not_change_any_more(
    directories: ShareDirectories,
) -> None:
    make(directories, path="old/data")
    directories.records.publish("pvc-1")
    assert make(directories, path="new/data").path == "old/data"


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", ".", "..", "a/../b", "a//b", "a/./b", "a/", "/a", "a\0b", "a\nb"),
        *("a" * 300, "a/" * 2600, PRIVATE, f"{PRIVATE}/trash/x", ".External-Storage/records"),
    ],
)
def test_a_path_that_is_no_plain_one_below_the_base_is_refused(
    directories: ShareDirectories, export: Export, path: str
) -> None:
    """N17."""
    before = sorted(export.point.rglob("*"))
    with pytest.raises(ValueError, match=r"path|segment|reserved|character|absolute"):
        make(directories, path=path)
    assert sorted(export.point.rglob("*")) == before


@pytest.mark.parametrize(("one", "other"), [("a", "a"), ("a/b", "a"), ("a", "a/b"), ("a", "a/b/c")])
def test_no_two_volumes_have_one_directory_or_one_within_the_other(
    directories: ShareDirectories, export: Export, one: str, other: str
) -> None:
    """N19."""
    make(directories, "pvc-1", one)
    with pytest.raises(PathTaken, match=r"pvc-1|other volumes"):
        make(directories, "pvc-2", other, adopt=True)
    with pytest.raises(PathTaken):
        make(directories, "pvc-2", other, adopt=True, shared=True)
    assert [record.name for record in directories.records.all()] == ["pvc-1"]


# -- shared


def test_a_shared_directory_goes_with_its_last_volume(
    directories: ShareDirectories, export: Export
) -> None:
    """N19."""
    for name in ("pvc-1", "pvc-2", "pvc-3"):
        assert not make(directories, name, shared=True).adopted
        directories.records.publish(name)
    (export.point / "ns/data/file").touch()
    assert directories.remove("pvc-1").ending is Ending.SHARED
    assert directories.archive("pvc-3").ending is Ending.SHARED
    assert (export.point / "ns/data/file").exists()
    assert directories.records.holders("ns/data") == ["pvc-2"]
    assert directories.remove("pvc-2").ending is Ending.REMOVED
    assert not (export.point / "ns").exists()


def test_what_is_begun_in_a_shared_directory_is_discarded_without_it(
    directories: ShareDirectories, export: Export
) -> None:
    make(directories, "pvc-1", shared=True)
    directories.records.publish("pvc-1")
    make(directories, "pvc-2", shared=True)
    record = directories.records.get("pvc-2")
    assert record is not None
    directories.discard(record)
    assert directories.records.holders("ns/data") == ["pvc-1"]
    assert (export.point / "ns/data").is_dir()


def test_a_volume_that_another_replica_added_to_a_shared_directory_keeps_it(
    directories: ShareDirectories, export: Export
) -> None:
    """The leader that was has ended its last call after we had read the records."""
    make(directories, "pvc-1", shared=True)
    directories.records.publish("pvc-1")
    former = export.directories("files")
    make(former, "pvc-2", shared=True)
    assert directories.remove("pvc-1").ending is Ending.SHARED
    assert (export.point / "ns/data").is_dir()


# -- remove


def test_removing_takes_the_directory_and_the_empty_ones_above_away(
    directories: ShareDirectories, export: Export
) -> None:
    make(directories, "pvc-1", "a/b/c")
    make(directories, "pvc-2", "a/d")
    directories.records.publish("pvc-1")
    (export.point / "a/b/c/file").write_text("data")
    assert directories.remove("pvc-1").ending is Ending.REMOVED
    assert [path.name for path in (export.point / "a").iterdir()] == ["d"]
    assert [record.name for record in directories.records.all()] == ["pvc-2"]
    until(lambda: not trash(export), "the trash is emptied")
    assert directories.remove("pvc-1").ending is Ending.MISSING


def test_the_path_that_is_told_must_be_the_one_of_the_record(
    directories: ShareDirectories, export: Export
) -> None:
    """N23."""
    make(directories)
    directories.records.publish("pvc-1")
    (export.point / "other").mkdir()
    with pytest.raises(DirectoryRefused, match="ns/data by its record, not other"):
        directories.remove("pvc-1", path="other")
    assert (export.point / "other").is_dir()
    assert (export.point / "ns/data").is_dir()


def test_a_directory_of_a_predecessor_is_removed_by_its_path(
    directories: ShareDirectories, export: Export
) -> None:
    (export.point / "ns-data-pvc-9/deep").mkdir(parents=True)
    assert directories.remove("pvc-9", path="ns-data-pvc-9").ending is Ending.REMOVED
    assert not (export.point / "ns-data-pvc-9").exists()
    assert directories.remove("pvc-9", path="ns-data-pvc-9").ending is Ending.MISSING


def test_a_directory_of_a_predecessor_with_other_volumes_in_it_is_left_alone(
    directories: ShareDirectories, export: Export
) -> None:
    make(directories, "pvc-1", "ns/data")
    for path in ("ns", "ns/data", "ns/data/deep"):
        with pytest.raises(PathTaken, match="left alone"):
            directories.remove("pvc-9", path=path)
    assert (export.point / "ns/data").is_dir()


def test_what_was_begun_and_is_not_ours_is_left_when_it_is_discarded(
    directories: ShareDirectories, export: Export
) -> None:
    """Ours was taken away by somebody, who has put another directory there."""
    make(directories)
    (export.point / "ns/data").rmdir()
    (export.point / "ns/data").mkdir()
    # tmpfs gives a new number each time: this is another directory
    record = directories.records.get("pvc-1")
    assert record is not None
    directories.discard(record)
    assert (export.point / "ns/data").is_dir()
    assert directories.records.all() == []


def test_an_adopted_directory_is_never_discarded(
    directories: ShareDirectories, export: Export
) -> None:
    (export.point / "ns/data").mkdir(parents=True)
    make(directories, adopt=True)
    record = directories.records.get("pvc-1")
    assert record is not None
    directories.discard(record)
    assert (export.point / "ns/data").is_dir()
    make(directories, adopt=True)
    assert directories.remove("pvc-1").ending is Ending.KEPT
    assert (export.point / "ns/data").is_dir()


def test_an_empty_directory_of_a_volume_that_was_never_saved_is_not_archived(
    directories: ShareDirectories, export: Export
) -> None:
    make(directories)
    assert directories.archive("pvc-1").ending is Ending.REMOVED
    assert [path.name for path in export.point.iterdir()] == [PRIVATE]


def test_data_of_a_volume_whose_saving_was_not_written_down_is_archived(
    directories: ShareDirectories, export: Export
) -> None:
    make(directories)
    (export.point / "ns/data/file").touch()
    ended = directories.archive("pvc-1")
    assert ended.ending is Ending.ARCHIVED
    assert (export.point / ended.place / "file").exists()


def test_a_kept_directory_is_forgotten_and_stays(
    directories: ShareDirectories, export: Export
) -> None:
    make(directories)
    directories.records.publish("pvc-1")
    assert directories.keep("pvc-1").ending is Ending.KEPT
    assert directories.records.all() == []
    assert (export.point / "ns/data").is_dir()


def test_a_directory_that_is_a_mount_is_told_and_left_with_its_data(
    directories: ShareDirectories, export: Export
) -> None:
    """N26: a rename across file systems."""
    make(directories)
    directories.records.publish("pvc-1")
    point = export.point / "ns/data"
    run("mount", "-t", "tmpfs", "other", point)
    try:
        (point / "precious").touch()
        for act in (directories.remove, directories.archive):
            with pytest.raises(DirectoryRefused, match=os.strerror(errno.EBUSY)):
                act("pvc-1")
        assert (point / "precious").exists()
    finally:
        run("umount", point)
    assert directories.remove("pvc-1").ending is Ending.REMOVED


def test_whether_a_directory_is_there(directories: ShareDirectories, export: Export) -> None:
    (export.point / "there").mkdir()
    assert directories.exists("there")
    assert not directories.exists("not/there")


def test_an_error_of_the_server_is_a_failure_that_names_the_share_and_the_path(
    directories: ShareDirectories, export: Export
) -> None:
    (export.point / "ns").touch()
    says = r"share 'files' .* ns/data: a link or no directory.* \(at ns\)"
    with pytest.raises(ProvisioningFailed, match=says):
        make(directories)
    assert directories.records.all() == []
