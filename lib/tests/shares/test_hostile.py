"""Links that somebody plants on a share, also in the middle of a call, lead nowhere."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from external_storage.confine import Confined
from external_storage.shares import (
    PRIVATE,
    DirectoryRefused,
    Expected,
    Ownership,
    PathTaken,
    ShareDirectories,
)
from external_storage.shares.layout import TRASH, Site
from external_storage.shares.making import look, place, prepare_new
from external_storage.shares.removing import archive, to_trash

from .conftest import LIMIT_S, Export, claim

CALLS = 10_000
GROUP = Ownership(gid=os.getgid(), mode=0o2777)


@pytest.fixture
def outside(export: Export) -> Path:
    """A directory of the same file system that nothing may touch."""
    path = export.point / "outside"
    (path / "volume").mkdir(parents=True)
    (path / "volume/precious").write_text("precious")
    path.chmod(0o751)
    return path


def state_of(directory: Path) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for path in (directory, *sorted(directory.rglob("*"))):
        facts = path.lstat()
        found.append((path, facts.st_mode, facts.st_uid, facts.st_gid, facts.st_ino))
    return found


def make(on: ShareDirectories, path: str, **options: Any) -> Any:
    return on.make("pvc-1", claim=claim(), path=path, ownership=GROUP, **options)


@pytest.mark.parametrize("link", ["way", "way/volume"])
def test_a_planted_link_is_refused_by_every_operation(
    directories: ShareDirectories, export: Export, outside: Path, link: str
) -> None:
    """N21."""
    before = state_of(outside)
    (export.point / link).parent.mkdir(exist_ok=True)
    (export.point / link).symlink_to(outside if link == "way" else outside / "volume")
    for call in (
        lambda: make(directories, "way/volume"),
        lambda: make(directories, "way/volume", adopt=True),
        lambda: make(directories, "way/volume/below"),
        lambda: directories.remove("pvc-9", path="way/volume"),
        lambda: directories.archive("pvc-9", path="way/volume"),
        lambda: directories.exists("way/volume"),
    ):
        with pytest.raises(DirectoryRefused, match="link"):
            call()
    assert state_of(outside) == before
    assert directories.records.all() == []
    assert (export.point / link).is_symlink()


def test_a_link_in_the_place_of_a_volume_is_not_followed_when_it_is_removed(
    directories: ShareDirectories, export: Export, outside: Path
) -> None:
    """N21: the volume's user has no right to do this; who has the share's top may."""
    before = state_of(outside)
    make(directories, "volume")
    directories.records.publish("pvc-1")
    (export.point / "volume").rmdir()
    (export.point / "volume").symlink_to(outside / "volume")
    for call in (directories.remove, directories.archive):
        with pytest.raises(DirectoryRefused, match="link"):
            call("pvc-1")
    assert state_of(outside) == before
    assert "pvc-1" in directories.records


SWAPPER = """
import ctypes, itertools, os, select, sys
os.chdir(sys.argv[1])
library, here, exchange, count = ctypes.CDLL(None), -100, 2, 0
print("ready", flush=True)
target = os.readlink("link")
for turn in itertools.count(1):
    # Atomic: at every moment the name is either the directory or the link that leads out.
    if library.renameat2(here, sys.argv[2].encode(), here, b"link", exchange) == 0:
        count += 1
    elif not os.path.islink("link"):
        # It was the link that was taken away, as the volume.
        os.rmdir("link")
        os.symlink(target, "link")
    # Else there is nothing to swap just now, or any more.
    if turn % 1000 == 0 and select.select([0], [], [], 0)[0]:
        break
    os.sched_yield()
print(count)
"""


@contextmanager
def swapping(directory: Path, name: str) -> Iterator[list[int]]:
    """A second process that swaps a directory and a link; how often, at the end."""
    told: list[int] = []
    swapper = subprocess.Popen(
        [sys.executable, "-c", SWAPPER, directory, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert swapper.stdout is not None
        assert swapper.stdout.readline() == b"ready\n"
        yield told
        output, _ = swapper.communicate(timeout=LIMIT_S)
        told.append(int(output))
    finally:
        swapper.kill()
        swapper.wait(timeout=LIMIT_S)


def site_of(export: Export) -> Site:
    expected = Expected(source=export.source, fs_types=frozenset({"tmpfs"}))
    return Site(base=export.point, expected=expected, our_uid=os.geteuid())


def run_against_swaps(
    calls: tuple[Callable[[], object], ...], directory: Path, name: str
) -> tuple[int, int]:
    """Make 10,000 calls while the name is swapped; how many found a directory, how many a link."""
    worked = refused = 0
    with swapping(directory, name) as told:
        for call in itertools.islice(itertools.cycle(calls), CALLS):
            try:
                worked += call() not in (None, False)
            except NotADirectoryError:
                refused += 1
            except FileNotFoundError:
                pass  # not there any more, because of another call
    assert told[0] > CALLS
    return worked, refused


def test_a_link_swapped_in_above_the_volume_during_the_call_leads_nowhere(
    directories: ShareDirectories, export: Export, outside: Path
) -> None:
    """N21: what the share's process runs, against a second process."""
    before = state_of(outside)
    directories.stop()
    (export.point / "way").mkdir()
    (export.point / "way/other").touch()  # else it would be removed as empty
    (export.point / "link").symlink_to(outside)
    site, path = site_of(export), ("way", "volume")
    calls = (
        lambda: prepare_new(site, "pvc-1", GROUP),
        lambda: place(site, "pvc-1", path, 0o777),
        lambda: look(site, path),
        lambda: to_trash(site, "pvc-1", path),
        lambda: prepare_new(site, "pvc-1", GROUP),
        lambda: place(site, "pvc-1", path, 0o777),
        lambda: archive(site, "pvc-1", path, 0.0, None),
        lambda: to_trash(site, "pvc-1", path),
    )
    worked, refused = run_against_swaps(calls, export.point, "way")
    assert worked, "the calls never met the directory"
    assert refused, "the calls never met the link"
    assert state_of(outside) == before


def test_a_link_swapped_in_for_the_volume_during_the_call_leads_nowhere(
    directories: ShareDirectories, export: Export, outside: Path
) -> None:
    """N21."""
    before = state_of(outside)
    directories.stop()
    volume = export.point / "volume"
    volume.mkdir()
    (export.point / "link").symlink_to(outside / "volume")
    site, path, number = site_of(export), ("volume",), itertools.count(2)
    calls = (
        lambda: prepare_new(site, "pvc-1", GROUP),
        lambda: place(site, "pvc-1", path, 0o777),
        lambda: look(site, path),
        lambda: to_trash(site, "pvc-1", path),
        lambda: prepare_new(site, "pvc-1", GROUP),
        lambda: place(site, "pvc-1", path, 0o777),
        lambda: to_trash(site, "pvc-1", path, 1),  # another directory's number
        lambda: archive(site, f"pvc-{next(number)}", path, 0.0, None),
    )
    worked, refused = run_against_swaps(calls, export.point, "volume")
    assert worked, "the calls never met the directory"
    assert refused, "the calls never met the link"
    taken = [*export.point.glob("archived-*"), *(export.point / PRIVATE / "trash").iterdir()]
    assert {path.name[:3] for path in taken} == {"arc", "pvc"}, "nothing was removed or archived"
    with Confined(export.point) as tree:
        for entry in tree.listdir(TRASH):
            # Also a link that was taken away in the volume's place, in the moment after the look.
            assert tree.remove_tree((*TRASH, entry))
    assert state_of(outside) == before


def test_a_volume_within_an_archive_or_a_foreign_volume_is_not_made(
    directories: ShareDirectories,
) -> None:
    make(directories, "team")
    with pytest.raises(PathTaken):
        directories.make("pvc-2", claim=claim("uid-2"), path="team/x", ownership=GROUP)
