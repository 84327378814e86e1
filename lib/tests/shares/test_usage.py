"""How much is in a tree."""

from __future__ import annotations

import os

import pytest

from external_storage.shares import ShareDirectories, Usage, usage

from .conftest import Export


def test_blocks_and_files_are_counted(
    directories: ShareDirectories, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = export.point / "volume"
    (top / "deep/er").mkdir(parents=True)
    (top / "deep/er/data").write_bytes(b"x" * 10_000)
    with (top / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    (top / "link").symlink_to("/")
    (top / "a\nname\udcff").touch()
    found = directories.usage("volume")
    assert found == Usage(bytes=3 * 4096, files=6)


def test_it_goes_on_where_it_was_after_each_turn(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "_TURN_S", 0.0)  # each turn ends after one entry
    directories = export.directories()
    for number in range(20):
        (export.point / "volume" / str(number)).mkdir(parents=True)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return False

    found = directories.usage("volume", stop=stop)
    assert found == Usage(bytes=0, files=20)
    assert len(asked) > 20
    assert directories.usage("volume", stop=lambda: True) is None


def test_a_tree_that_is_not_there_or_deeper_than_counted(
    directories: ShareDirectories, export: Export
) -> None:
    with pytest.raises(Exception, match="nowhere"):
        directories.usage("nowhere")
    (export.point / "volume").mkdir()
    at = os.open(export.point / "volume", os.O_RDONLY)
    for _ in range(150):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    assert directories.usage("volume") == Usage(bytes=0, files=101)
