"""Archived directories: named for people, never replaced, removed when their time is over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from external_storage.shares import PRIVATE, Ending, Ownership, ShareDirectories

from .conftest import Export, claim, until


def publish(on: ShareDirectories, name: str = "pvc-1", path: str = "ns/data") -> None:
    on.make(name, claim=claim(f"uid-of-{name}"), path=path, ownership=Ownership())
    on.records.publish(name)


def archived(export: Export) -> list[str]:
    return sorted(path.name for path in export.point.glob("archived-*"))


def notes(export: Export) -> list[Path]:
    return sorted((export.point / PRIVATE / "archives").iterdir())


def test_an_archive_has_a_name_of_its_own_right_below_the_base(
    directories: ShareDirectories, export: Export
) -> None:
    """N26: the last segment alone would be the same for both."""
    for name, path in (("pvc-1", "ns1/data"), ("pvc-2", "ns2/data"), ("pvc-3", "ns-c-pvc-3")):
        publish(directories, name, path)
        (export.point / path / "file").write_text(name)
        ended = directories.archive(name)
        assert ended.ending is Ending.ARCHIVED
        assert (export.point / ended.place / "file").read_text() == name
    one, two, three = archived(export)
    assert one.startswith("archived-ns-c-pvc-3-2")  # the volume's name is not said twice
    assert two.startswith("archived-ns1-data-pvc-1-")
    assert three.startswith("archived-ns2-data-pvc-2-")
    assert not (export.point / "ns1").exists()
    assert directories.records.all() == []


def test_an_archive_replaces_nothing(
    directories: ShareDirectories, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N26: somebody has put a directory in its place, an empty one even."""
    monkeypatch.setattr("time.time", lambda: 1_000_000.0)
    planted = export.point / "archived-ns-data-pvc-1-19700112T134640Z"
    planted.mkdir()
    publish(directories)
    (export.point / "ns/data/file").touch()
    ended = directories.archive("pvc-1")
    assert ended.place.startswith(f"{planted.name}-")
    assert (export.point / ended.place / "file").exists()
    assert list(planted.iterdir()) == []


def test_a_long_path_is_cut_in_the_name_of_its_archive(
    directories: ShareDirectories, export: Export
) -> None:
    publish(directories, path="ä" * 120 + "/" + "b" * 200)
    ended = directories.archive("pvc-1")
    assert len(ended.place.encode()) <= 255
    assert "-pvc-1-" in ended.place
    assert (export.point / ended.place).is_dir()


def test_archives_are_removed_when_their_time_is_over_and_not_before(
    directories: ShareDirectories, export: Export
) -> None:
    times: dict[str, float | None] = {"pvc-0": 0.0, "pvc-1": 3600.0, "pvc-2": None}
    for name, keep_s in times.items():
        publish(directories, name, name)
        (export.point / name / "file").touch()
        directories.archive(name, keep_s=keep_s)
    directories.tidy()
    assert [name[9:14] for name in archived(export)] == ["pvc-1", "pvc-2"]
    until(lambda: not list((export.point / PRIVATE / "trash").iterdir()), "its files are removed")
    assert [path.name for path in notes(export)] == ["pvc-1.json", "pvc-2.json"]


def change(export: Export, **fields: Any) -> None:
    (note,) = notes(export)
    note.write_text(json.dumps({**json.loads(note.read_text()), **fields}))


@pytest.mark.parametrize("how", ["another directory", "a volume in it", "damaged note"])
def test_what_is_not_certainly_our_archive_is_kept(
    directories: ShareDirectories, export: Export, how: str
) -> None:
    publish(directories)
    place = directories.archive("pvc-1", keep_s=0.0).place
    if how == "another directory":  # restored from a backup, say
        (export.point / place).rename(export.point / "aside")
        (export.point / place).mkdir()
    elif how == "a volume in it":
        publish(directories, "pvc-2", f"{place}/restored")
    else:
        notes(export)[0].write_text("{")
    (export.point / place / "precious").touch()
    directories.tidy()
    assert (export.point / place / "precious").exists()


def test_a_note_whose_archive_is_gone_goes(directories: ShareDirectories, export: Export) -> None:
    publish(directories)
    place = directories.archive("pvc-1", keep_s=0.0).place
    (export.point / place).rmdir()
    directories.tidy()
    assert notes(export) == []


def test_a_note_that_names_a_path_elsewhere_removes_nothing(
    directories: ShareDirectories, export: Export
) -> None:
    publish(directories)
    directories.archive("pvc-1", keep_s=0.0)
    (export.point / "precious").mkdir()
    change(export, place="../precious")
    directories.tidy()
    assert (export.point / "precious").is_dir()
    assert directories.problem() is None
