"""Whether a share can be used: the mount is looked at before everything, and comes back."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from external_storage import deadline, shares
from external_storage.deadline import Deadline
from external_storage.errors import Unchanged
from external_storage.shares import (
    PRIVATE,
    Expected,
    Ownership,
    Share,
    ShareDirectories,
    ShareUnavailable,
)

from .conftest import LIMIT_S, SERVER, Disk, Export, claim, run, until

TMPFS = frozenset({"tmpfs"})


def make(on: ShareDirectories, name: str = "pvc-1") -> Any:
    return on.make(name, claim=claim(f"uid-of-{name}"), path=name, ownership=Ownership())


def looked_at(share: Share) -> str:
    """The trouble that the first look has found."""
    share.start()
    assert share.wait_looked_at(LIMIT_S)
    return share.problem() or ""


# -- the wrong mount


def test_before_the_first_look_nothing_can_be_done(export: Export, in_worker: Any) -> None:
    share = export.share()
    assert "has not been looked at" in (share.problem() or "")
    with pytest.raises(ShareUnavailable):
        share.call(in_worker.pid)


def test_a_directory_that_is_not_mounted_is_refused_and_nothing_is_made_there(
    export: Export,
) -> None:
    export.unmount()
    text = looked_at(export.share())
    assert f"{export.source} is not mounted at {export.point}" in text
    assert "of type tmpfs" in text
    assert list(export.point.iterdir()) == []


@pytest.mark.parametrize(
    ("expected", "says"),
    [
        (Expected(source="other.example.com:/exports/data", fs_types=TMPFS), "want other.example"),
        (
            Expected(source=f"{SERVER}:/exports/data2", fs_types=TMPFS),
            "want files.example.com:/exp",
        ),
        (Expected(source=f"{SERVER}:/", fs_types=TMPFS), "want files.example.com:/"),
        (Expected.nfs(SERVER, "/exports/data"), "want a file system of type nfs or nfs4"),
    ],
)
def test_another_mount_than_the_expected_one_is_refused(
    export: Export, expected: Expected, says: str
) -> None:
    assert says in looked_at(export.share(expected=expected))
    assert list(export.point.iterdir()) == []


def test_a_read_only_mount_is_refused(export: Export) -> None:
    run("mount", "-o", "remount,ro", export.point)
    assert "is mounted read-only" in looked_at(export.share())


def test_a_read_only_bind_mount_is_refused(export: Export, tmp_path: Path) -> None:
    (tmp_path / "bind").mkdir()
    run("mount", "--bind", export.point, tmp_path / "bind")
    try:
        run("mount", "-o", "remount,ro,bind", tmp_path / "bind")
        export.point = tmp_path / "bind"
        assert "is mounted read-only" in looked_at(export.share())
    finally:
        run("umount", "-l", tmp_path / "bind")


def test_the_mount_may_be_of_a_directory_above(export: Export) -> None:
    (export.point / "team/a").mkdir(parents=True)
    share = Share(
        "team",
        server=SERVER,
        path="/exports/data/team/a/",
        mount_point=export.point / "team/a",
        expected=Expected(source=f"{SERVER.upper()}:/exports//data/team/a/", fs_types=TMPFS),
    )
    try:
        assert looked_at(share) == ""
        assert share.server_path("x") == "/exports/data/team/a/x"
    finally:
        share.stop()


def test_a_directory_of_the_mount_may_be_bound_elsewhere(export: Export, tmp_path: Path) -> None:
    """As the kubelet does with a subPath."""
    (export.point / "team/a").mkdir(parents=True)
    (tmp_path / "bind").mkdir()
    run("mount", "--bind", export.point / "team", tmp_path / "bind")
    share = Share(
        "team",
        server=SERVER,
        path="/exports/data/team/a",
        mount_point=tmp_path / "bind/a",
        expected=Expected(source=f"{SERVER}:/exports/data/team/a", fs_types=TMPFS),
    )
    try:
        assert looked_at(share) == ""
    finally:
        share.stop()
        run("umount", "-l", tmp_path / "bind")


def test_a_private_directory_that_somebody_planted_is_refused(export: Export) -> None:
    private = export.point / PRIVATE
    private.mkdir(mode=0o700)
    os.chown(private, 1234, 1234)
    assert "belongs to uid 1234" in looked_at(export.share())
    assert list(private.iterdir()) == []


def test_a_private_directory_that_others_may_enter_is_refused(export: Export) -> None:
    (export.point / PRIVATE).mkdir()
    (export.point / PRIVATE).chmod(0o755)
    assert "has mode 0755, want 0700" in looked_at(export.share())


def test_a_private_directory_that_is_a_link_is_refused(export: Export, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o700)
    (export.point / PRIVATE).symlink_to(outside)
    assert "link" in looked_at(export.share())
    assert list(outside.iterdir()) == []


def test_a_private_directory_that_is_replaced_later_is_refused(
    directories: ShareDirectories, export: Export
) -> None:
    """Somebody who may write to the share's top moves ours away."""
    (export.point / PRIVATE).rename(export.point / "aside")
    (export.point / PRIVATE).mkdir(mode=0o700)
    os.chown(export.point / PRIVATE, 1234, 1234)
    with pytest.raises(ShareUnavailable, match="belongs to uid 1234"):
        make(directories)
    assert list((export.point / PRIVATE).iterdir()) == []


# -- under way


def test_a_share_that_is_unmounted_under_way_refuses_and_comes_back_by_itself(
    directories: ShareDirectories, export: Export
) -> None:
    export.unmount()
    with pytest.raises(ShareUnavailable, match="is not mounted"):
        make(directories)
    assert list(export.point.iterdir()) == []
    export.mount()
    until(lambda: directories.problem() is None, "it has come back")
    make(directories)
    assert (export.point / "pvc-1").is_dir()


def test_a_share_that_turns_read_only_is_unavailable_until_it_is_writable(
    directories: ShareDirectories, export: Export
) -> None:
    run("mount", "-o", "remount,ro", export.point)
    with pytest.raises(ShareUnavailable, match="read-only"):
        make(directories)
    run("mount", "-o", "remount,rw", export.point)
    until(lambda: directories.problem() is None, "it has come back")
    make(directories)


def test_unavailable_means_that_nobody_could_be_asked() -> None:
    """So the library tells it in a Normal event and takes nothing for running."""
    assert issubclass(ShareUnavailable, Unchanged)


# -- it hangs


def test_a_call_that_hangs_is_killed_and_others_fail_at_once(disk: Disk) -> None:
    """N28; a write to a frozen file system cannot even be killed."""
    on = disk.directories("disk", call_limit_s=2.0)
    disk.freeze()
    with pytest.raises(ShareUnavailable, match="has not answered for 2 s"):
        make(on)
    assert on.share.kills >= 1
    failed: list[str] = []

    def call() -> None:
        try:
            make(on, f"pvc-{threading.get_ident()}")
        except ShareUnavailable as error:
            failed.append(str(error))

    threads = [threading.Thread(target=call) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert len(failed) == 20
    assert on.share.stuck <= 3, "processes pile up"
    disk.thaw()
    until(lambda: on.problem() is None, "it has come back")
    make(on)
    assert (disk.point / "pvc-1").is_dir()


def test_a_share_that_hangs_holds_up_no_other(disk: Disk, export: Export) -> None:
    """N28."""
    hanging, other = disk.directories("disk", call_limit_s=2.0), export.directories("files")
    disk.freeze()
    held = threading.Thread(target=lambda: _fails(lambda: make(hanging)))
    held.start()
    for number in range(5):
        make(other, f"pvc-{number}")
    assert other.problem() is None
    held.join(LIMIT_S)
    assert hanging.problem() is not None


def test_a_stopped_process_is_killed_at_the_limit(export: Export, in_worker: Any) -> None:
    on = export.directories(call_limit_s=2.0)
    with pytest.raises(ShareUnavailable, match="has not answered for 2 s"):
        on.share.call(in_worker.hang)
    until(lambda: on.problem() is None, "it has come back")
    make(on)


def test_the_deadline_of_our_caller_cuts_a_call_short(
    directories: ShareDirectories, in_worker: Any
) -> None:
    began = time.monotonic()
    with deadline.within(Deadline(began + 2.0)), pytest.raises(ShareUnavailable):
        directories.share.call(in_worker.hang)
    assert time.monotonic() - began < LIMIT_S / 2, "the share's own limit was waited for"


def test_a_call_without_time_is_not_made_and_no_reason_to_doubt_the_share(
    directories: ShareDirectories, export: Export
) -> None:
    with deadline.within(Deadline(0.0)), pytest.raises(ShareUnavailable):
        make(directories)
    assert directories.problem() is None
    assert not (export.point / "pvc-1").exists()


def test_a_process_that_is_killed_from_outside_is_started_again(
    directories: ShareDirectories, in_worker: Any
) -> None:
    os.kill(directories.share.call(in_worker.pid), signal.SIGKILL)
    until(lambda: not _fails(lambda: make(directories)), "it works again")


def _fails(call: Callable[[], object]) -> bool:
    try:
        call()
    except ShareUnavailable:
        return True
    return False


def test_an_error_of_one_path_is_no_reason_to_doubt_the_share(
    directories: ShareDirectories, in_worker: Any
) -> None:
    with pytest.raises(NotADirectoryError):
        directories.share.call(in_worker.look_below_a_file)
    assert directories.problem() is None


@pytest.mark.parametrize("number", [errno.EROFS, errno.ESTALE])
def test_a_read_only_or_stale_path_is_no_reason_to_doubt_the_share(
    directories: ShareDirectories, in_worker: Any, number: int
) -> None:
    """The read-only snapshots of a filer; what another client has removed."""
    with pytest.raises(OSError, match=r"\.snapshot") as told:
        directories.share.call(in_worker.fail, number)
    assert told.value.errno == number
    assert directories.problem() is None


def test_a_mount_that_is_stale_as_a_whole_is_found_out(
    directories: ShareDirectories, in_worker: Any, export: Export
) -> None:
    """The path's error is looked into: what is wrong with the mount is told instead."""
    export.unmount()
    with pytest.raises(ShareUnavailable, match="is not mounted"):
        directories.share.call(in_worker.fail, errno.ESTALE)
    assert directories.problem() is not None


def test_a_stopped_share_calls_nothing_and_leaves_no_process(
    export: Export, in_worker: Any
) -> None:
    on = export.directories()
    worker = on.share.call(in_worker.pid)
    on.stop()
    with pytest.raises(ShareUnavailable):
        make(on)
    until(lambda: not Path(f"/proc/{worker}").exists(), "the process is gone")


# -- for the time of a command


def test_shares_of_a_command_are_available_and_stopped_afterwards(
    export: Export, in_worker: Any
) -> None:
    share = export.share()
    with shares.looked_at([share], LIMIT_S):
        process = share.call(in_worker.pid)
    assert not Path(f"/proc/{process}").exists()
    with pytest.raises(ShareUnavailable):
        share.call(in_worker.pid)


def test_when_one_of_a_command_is_not_available_none_is_left_running(
    export: Export, tmp_path: Path
) -> None:
    good, bad = export.share("good"), export.share("bad", mount_point=tmp_path / "nothing")
    before = threading.active_count()
    with (
        pytest.raises(ShareUnavailable, match="share 'bad'"),
        shares.looked_at([good, bad], LIMIT_S),
    ):
        pytest.fail("half of the shares are no inventory")
    assert threading.active_count() == before
