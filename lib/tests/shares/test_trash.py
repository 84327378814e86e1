"""What is deleted is out of the way at once, and removed behind."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from external_storage.shares import (
    PRIVATE,
    Ending,
    Ownership,
    ShareDirectories,
    ShareUnavailable,
    trash,
)

from .conftest import LIMIT_S, OURS, Disk, Export, claim, run, until


def publish(on: ShareDirectories, name: str = "pvc-1", path: str = "ns/data") -> None:
    on.make(name, claim=claim(f"uid-of-{name}"), path=path, ownership=Ownership())
    on.records.publish(name)


def in_trash(point: Path) -> list[Path]:
    return sorted((point / PRIVATE / "trash").iterdir())


def test_a_delete_does_not_wait_for_the_files(export: Export) -> None:
    """At one file a second the trash cannot be empty before the delete has long returned."""
    share = export.share()
    on = ShareDirectories(share, owner=lambda: OURS, removals_per_s=1.0)
    export.stack.callback(on.stop)
    on.start()
    until(lambda: on.problem() is None, "available")
    publish(on)
    for number in range(100):
        (export.point / f"ns/data/{number}").touch()
    assert on.remove("pvc-1").ending is Ending.REMOVED
    assert not (export.point / "ns").exists()
    publish(on, "pvc-2")
    (entry,) = in_trash(export.point)
    assert len(list(entry.iterdir())) > 50
    on.stop()
    # Another process goes on where this one was ended.
    export.directories()
    until(lambda: not in_trash(export.point), "the trash is emptied")
    assert (export.point / "ns/data").is_dir()


def test_what_cannot_be_removed_is_told_the_rest_goes_and_it_is_tried_again(disk: Disk) -> None:
    """N27."""
    on = disk.directories("disk")
    publish(on, "pvc-1", "one")
    publish(on, "pvc-2", "two")
    for name in ("a", "b/c", "held/inside", "z"):
        (disk.point / "one" / name).parent.mkdir(exist_ok=True)
        (disk.point / "one" / name).touch()
    run("chattr", "+i", disk.point / "one/held/inside")
    try:
        on.remove("pvc-1")
        on.remove("pvc-2")
        until(on.trash_problem, "it is told")
        (left,) = in_trash(disk.point)
        assert [str(path.relative_to(left)) for path in sorted(left.rglob("*"))] == [
            "held",
            "held/inside",
        ]
        assert "held/inside: Operation not permitted" in (on.trash_problem() or "")
        assert on.problem() is None
        on.share.look_anew("it is to be seen", timeout_s=LIMIT_S)
        assert on.trash_entries() == 1
        until(lambda: on.problem() is None, "it was looked at")
    finally:
        for path in list(disk.point.rglob("inside")):
            run("chattr", "-i", path)
    on.tidy()
    until(lambda: not in_trash(disk.point), "it is removed after all")
    until(lambda: on.trash_problem() is None, "nothing is told any more")


def test_more_than_a_turn_cannot_remove_holds_up_nothing_behind_it(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the server squashes root: the files of pods that ran as other users."""
    monkeypatch.setattr(trash, "_TURN_S", 0.5)
    on = disk.directories("disk", removals_per_s=20.0)
    publish(on, "pvc-1", "one")
    publish(on, "pvc-2", "two")
    for number in range(40):
        (disk.point / f"one/{number}").touch()
    run("chattr", "-R", "+i", disk.point / "one")
    run("chattr", "-i", disk.point / "one")
    try:
        on.remove("pvc-1")
        until(on.trash_problem, "it is told")
        on.remove("pvc-2")
        until(lambda: len(in_trash(disk.point)) == 1, "what is behind it is removed")
        assert "Operation not permitted" in (on.trash_problem() or "")
    finally:
        run("chattr", "-R", "-i", disk.point / PRIVATE / "trash")
    on.tidy()
    until(lambda: not in_trash(disk.point), "it is removed after all")


def test_what_somebody_else_has_removed_from_the_trash_is_no_trouble_any_more(
    directories: ShareDirectories, export: Export
) -> None:
    publish(directories)
    inside = export.point / "ns/data/inside"
    inside.touch()
    run("chattr", "+i", inside)
    try:
        directories.remove("pvc-1")
        until(directories.trash_problem, "it is told")
    finally:
        for path in list(export.point.rglob("inside")):
            run("chattr", "-i", path)
    for entry in in_trash(export.point):
        shutil.rmtree(entry)
    directories.share.look_anew("it is empty", timeout_s=LIMIT_S)
    until(lambda: directories.trash_problem() is None, "nothing is told any more")


def test_a_mount_in_a_deleted_directory_is_not_entered(
    directories: ShareDirectories, export: Export
) -> None:
    publish(directories)
    point = export.point / "ns/data/mount"
    point.mkdir()
    run("mount", "-t", "tmpfs", "other", point)
    try:
        (point / "precious").touch()
        directories.remove("pvc-1")
        until(directories.trash_problem, "it is told")
        (left,) = in_trash(export.point)
        assert (left / "mount/precious").exists()
        assert "another file system is mounted here" in (directories.trash_problem() or "")
    finally:
        for path in export.point.rglob("mount"):
            run("umount", "-l", path)


def test_a_directory_that_cannot_be_moved_is_told_and_left_whole(disk: Disk) -> None:
    """N27: EPERM at the rename itself."""
    on = disk.directories("disk")
    publish(on, "pvc-1", "ns/data")
    (disk.point / "ns/data/file").touch()
    run("chattr", "+i", disk.point / "ns")
    try:
        for act in (on.remove, on.archive):
            with pytest.raises(Exception, match=r"ns/data: Operation not permitted"):
                act("pvc-1")
        assert (disk.point / "ns/data/file").exists()
        assert "pvc-1" in on.records
    finally:
        run("chattr", "-i", disk.point / "ns")
    assert on.remove("pvc-1").ending is Ending.REMOVED


def test_a_trash_that_hangs_keeps_no_claim_waiting(
    export: Export, monkeypatch: pytest.MonkeyPatch, in_worker: Any
) -> None:
    """It is emptied by a process of its own."""
    on = export.directories()
    publish(on)
    begun: list[int] = []
    ended: list[str] = []

    def hang(emptier: trash.TrashEmptier) -> None:
        """As if the server did not answer, until the share is stopped."""
        begun.append(1)
        try:
            emptier._share.call_in(emptier._worker, LIMIT_S, in_worker.hang)
        except ShareUnavailable as error:
            ended.append(str(error))

    monkeypatch.setattr(trash.TrashEmptier, "_empty", hang)
    on.remove("pvc-1")
    until(lambda: begun, "the trash is being emptied")
    for number in range(3):
        publish(on, f"pvc-x{number}", f"x{number}")
    assert not ended
    on.stop()
    assert ended
    assert in_trash(export.point)


def test_the_pace_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    pace = trash.Pace(100.0, 10.0)
    steps = 0
    while not pace.over():
        steps += 1
    monkeypatch.undo()
    assert steps in (999, 1000)


def test_the_trash_waits_for_a_share_that_is_not_available(
    directories: ShareDirectories, export: Export
) -> None:
    publish(directories)
    export.unmount()
    with pytest.raises(ShareUnavailable):
        directories.remove("pvc-1")
    directories.tidy()
    export.mount()
    until(lambda: directories.problem() is None, "it has come back")
    assert [path.name for path in export.point.iterdir()] == [PRIVATE]
