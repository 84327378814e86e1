"""No link is followed and no mount is crossed, also when they appear in the middle of a call."""

import errno
import itertools
import os
import select
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from external_storage.confine import Confined

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
CALLS = SWAPS = 10_000


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.mkdir()
    return path


@pytest.fixture
def tree(base: Path) -> Iterator[Confined]:
    with Confined(base) as opened:
        yield opened


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory that nothing may touch."""
    path = tmp_path / "outside"
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "precious").write_text("precious")
    path.chmod(0o751)
    return path


def state_of(directory: Path) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for path in (directory, *sorted(directory.rglob("*"))):
        facts = path.lstat()
        found.append((path, facts.st_mode, facts.st_uid, facts.st_gid, facts.st_ino))
    return found


# -- links


def test_the_base_may_not_be_a_link(base: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(OSError, match="link"):
        Confined(tmp_path / "link")


def test_a_link_on_the_way_is_refused_by_every_call(
    tree: Confined, base: Path, outside: Path
) -> None:
    before = state_of(outside)
    (base / "a").mkdir()
    (base / "a/link").symlink_to(outside)
    (base / "file").touch()
    for path in ("a/link/sub", "a/link/sub/precious", "a/link/new", "file/x"):
        for call in (
            tree.mkdir,
            tree.stat,
            tree.listdir,
            tree.remove_tree,
            lambda p: tree.mkdir(p, parents=True, exist_ok=True),
            lambda p: tree.chmod(p, 0o777),
            lambda p: tree.chown(p, uid=os.geteuid()),
            lambda p: tree.rename(p, "stolen"),
            lambda p: tree.rename("file", p, replace=True),
        ):
            with pytest.raises(NotADirectoryError, match="links are not followed"):
                call(path)
        tree.remove_empty_parents(path + "/x")
    for call in (tree.listdir, lambda p: tree.chmod(p, 0o777), lambda p: tree.chown(p, uid=0)):
        with pytest.raises(NotADirectoryError):
            call("a/link")
    with pytest.raises(NotADirectoryError):
        tree.mkdir("a/link", exist_ok=True)
    assert stat.S_ISLNK(tree.stat("a/link").st_mode)
    assert state_of(outside) == before


SWAPPER = """
import ctypes, os, select, sys
os.chdir(sys.argv[1])
library, here, exchange, count = ctypes.CDLL(None), -100, 2, 0
print("ready", flush=True)
while True:
    # Atomic: at every moment "way" is either the directory or the link that leads out.
    assert library.renameat2(here, b"way", here, b"link", exchange) == 0
    count += 1
    if count == int(sys.argv[2]):
        print("enough", flush=True)
    if count % 1000 == 0 and select.select([0], [], [], 0)[0]:
        break
    os.sched_yield()
"""


def test_a_directory_swapped_for_a_link_during_the_calls_leads_nowhere(
    tree: Confined, base: Path, outside: Path
) -> None:
    before = state_of(outside)
    (base / "way").mkdir()
    (base / "way/sub").mkdir()
    (base / "link").symlink_to(outside)
    swapper = subprocess.Popen(
        [sys.executable, "-c", SWAPPER, base, str(SWAPS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    calls: tuple[Callable[[], object], ...] = (
        lambda: tree.mkdir("way/sub", mode=0o777, gid=os.getegid(), exist_ok=True),
        lambda: tree.mkdir("way/new/deep", mode=0o777, parents=True),
        lambda: tree.chmod("way/sub", 0o777),
        lambda: tree.chown("way/sub", gid=os.getegid()),
        lambda: tree.rename("way/sub", "way/moved"),
        lambda: tree.rename("way/moved", "way/sub"),
        lambda: tree.remove_tree("way/sub/precious"),
        lambda: tree.remove_tree("way/new"),
        lambda: tree.remove_empty_parents("way/new/deep"),
    )
    worked = refused = 0
    try:
        assert swapper.stdout is not None
        assert swapper.stdout.readline() == b"ready\n"
        # However the two share the processor: as many calls, and as many swaps beside them.
        for number, call in enumerate(itertools.cycle(calls)):
            if number >= CALLS and select.select([swapper.stdout], [], [], 0)[0]:
                break
            try:
                call()
                worked += 1
            except NotADirectoryError:
                refused += 1
            except (FileNotFoundError, FileExistsError):
                pass
        told, _ = swapper.communicate(timeout=60)
        assert told == b"enough\n"
    finally:
        swapper.kill()
        swapper.wait(timeout=60)
    assert worked, "the calls never met the directory"
    assert refused, "the calls never met the link"
    assert state_of(outside) == before


def test_a_tree_whose_directories_turn_into_links_is_removed_within_itself(
    tree: Confined, base: Path, outside: Path
) -> None:
    before = state_of(outside)
    stop = threading.Event()
    swapped = 0

    def swap() -> None:
        nonlocal swapped
        while not stop.is_set():
            with suppress(OSError):
                (base / "a/sub").rename(base / "aside")
                (base / "a/sub").symlink_to(outside)
                swapped += 1
            shutil.rmtree(base / "aside", ignore_errors=True)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(500):
            with suppress(FileExistsError):
                tree.mkdir("a")
            with suppress(OSError):
                (base / "a/sub/sub").mkdir(parents=True)
                (base / "a/sub/sub/precious").touch()
            with suppress(OSError):
                tree.remove_tree("a")
    finally:
        stop.set()
        thread.join(60)
    assert swapped
    assert state_of(outside) == before


# -- mounts


@contextmanager
def mounted(*arguments: str | Path) -> Iterator[None]:
    subprocess.run(["mount", *arguments], check=True, timeout=60)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", arguments[-1]], check=True, timeout=60)


@ROOT_ONLY
@pytest.mark.parametrize("how", ["tmpfs", "bind", "bind file"])
def test_remove_tree_never_crosses_a_mount(
    how: str, tree: Confined, base: Path, outside: Path
) -> None:
    (base / "a/b").mkdir(parents=True)
    point = base / "a/b/mount"
    arguments: list[str | Path]
    if how == "tmpfs":
        point.mkdir()
        arguments = ["-t", "tmpfs", "tmpfs", point]
    elif how == "bind":  # of the same device: st_dev alone would not tell
        point.mkdir()
        arguments = ["--bind", outside, point]
    else:
        point.touch()
        arguments = ["--bind", outside / "sub/precious", point]
    before = state_of(outside)
    with mounted(*arguments):
        if how == "tmpfs":
            (point / "data").touch()
        with pytest.raises(OSError, match="a/b/mount") as caught:
            tree.remove_tree("a")
        assert caught.value.errno in (errno.EXDEV, errno.EBUSY)
        tree.remove_empty_parents("a/b/mount/x")
        assert point.exists()
        assert how != "tmpfs" or (point / "data").exists()
    assert state_of(outside) == before
    assert tree.remove_tree("a")


@ROOT_ONLY
def test_rename_to_another_file_system_is_refused(tree: Confined, base: Path) -> None:
    (base / "a").mkdir()
    (base / "other").mkdir()
    with mounted("-t", "tmpfs", "tmpfs", base / "other"):
        with pytest.raises(OSError, match="other/a") as caught:
            tree.rename("a", "other/a")
        assert caught.value.errno == errno.EXDEV
        assert tree.listdir() == ["a", "other"]
