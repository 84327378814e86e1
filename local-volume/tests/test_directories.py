"""Directories: emptied by descriptors, never across a mount, through a link or somewhere else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from local_volume_provisioner.cleaning import directories
from local_volume_provisioner.cleaning.directories import MountTask, is_empty
from local_volume_provisioner.cleaning.guard import Refused
from local_volume_provisioner.config import ClassConfig
from local_volume_provisioner.mounts import MountTable
from local_volume_provisioner.scan import Candidate, Scanner

MIB = 1 << 20


def sh(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


@pytest.fixture
def entries(tmp_path: Path) -> Path:
    made = tmp_path / "entries"
    made.mkdir()
    return made


@pytest.fixture
def task(entries: Path) -> Callable[[str], MountTask]:
    def make(name: str) -> MountTask:
        config = ClassConfig(name="c", host_dir=str(entries), mount_dir=str(entries))
        found = Scanner().look(config, name, MountTable.read())
        assert isinstance(found, Candidate), found
        return MountTask(found.mount_path, found.number, found.identity)

    return make


def clean(task: MountTask) -> None:
    while not directories.clean(task, 5.0):
        pass


@pytest.fixture
def ext4(disks: Any, entries: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        disk = disks.disk(f"fs-{name}", 32 * MIB)
        sh("mkfs.ext4", "-q", disk.path)
        mounted: Path = disks.mount(entries / name, disk.path)
        return mounted

    return make


ODD = [
    "a b",
    "-rf",
    "*",
    "new\nline",
    "tab\t",
    ".hidden",
    b"\xff\xfe".decode(errors="surrogateescape"),
]


def fill(directory: Path) -> None:
    for name in ODD:
        (directory / name).mkdir()
        (directory / name / name).write_text("x")
        (directory / name / "to-root").symlink_to("/")
    os.mkfifo(directory / "fifo")
    deep = directory
    for _ in range(80):
        deep = deep / "d"
        deep.mkdir()
    (directory / "locked").mkdir(mode=0o000)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "tmpfs"])
def test_everything_goes_but_the_file_systems_own(
    kind: str, disks: Any, entries: Path, task: Callable[[str], MountTask]
) -> None:
    if kind == "tmpfs":
        mounted = disks.mount(entries / "m", "-t", "tmpfs", "none")
    else:
        disk = disks.disk("fs", 320 * MIB if kind == "xfs" else 32 * MIB)
        sh(f"mkfs.{kind}", "-q", disk.path)
        mounted = disks.mount(entries / "m", disk.path)
    fill(mounted)
    if kind == "ext4":
        (mounted / "lost+found" / "#12").write_text("found by fsck")
    assert not is_empty(task("m"))
    clean(task("m"))
    left = [path.name for path in mounted.iterdir()]
    assert left == (["lost+found"] if kind == "ext4" else [])
    assert not any(path for path in mounted.rglob("*") if path.name != "lost+found")
    assert is_empty(task("m"))


def test_an_unmounted_directory_is_never_emptied(
    ext4: Callable[[str], Path], task: Callable[[str], MountTask]
) -> None:
    """L1: the reference cleans the empty directory below, and offers the disk with its data."""
    mounted = ext4("m")
    known = task("m")
    sh("umount", str(mounted))
    (mounted / "of the root file system").write_text("x")
    with pytest.raises(Refused, match="nothing is mounted"):
        clean(known)
    assert (mounted / "of the root file system").exists()


def test_another_file_system_at_the_path_is_refused(
    ext4: Callable[[str], Path], disks: Any, task: Callable[[str], MountTask]
) -> None:
    mounted = ext4("m")
    known = task("m")
    sh("umount", str(mounted))
    ext4("m")
    (mounted / "file").write_text("x")
    with pytest.raises(Refused, match="file system UUID was"):
        clean(known)
    assert (mounted / "file").exists()


def test_a_mount_over_it_is_refused(
    ext4: Callable[[str], Path], disks: Any, task: Callable[[str], MountTask]
) -> None:
    mounted = ext4("m")
    known = task("m")
    disks.mount(mounted, "-t", "tmpfs", "none")
    (mounted / "file").write_text("x")
    with pytest.raises(Refused, match="another file system"):
        clean(known)
    assert (mounted / "file").exists()


def test_a_mount_in_it_is_not_entered(
    ext4: Callable[[str], Path], disks: Any, tmp_path: Path, task: Callable[[str], MountTask]
) -> None:
    """L9: the reference deletes into nested mounts."""
    mounted = ext4("m")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    disks.mount(mounted / "nested", "--bind", str(outside))
    (mounted / "mine").write_text("x")
    with pytest.raises(OSError, match="another file system is mounted here"):
        clean(task("m"))
    assert (outside / "file").read_text() == "precious"
    assert not (mounted / "mine").exists()
    sh("umount", str(mounted / "nested"))
    clean(task("m"))
    assert is_empty(task("m"))


def test_links_are_removed_and_not_followed(
    ext4: Callable[[str], Path], tmp_path: Path, task: Callable[[str], MountTask]
) -> None:
    mounted = ext4("m")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    (mounted / "link").symlink_to(outside)
    (mounted / "lost+found").rmdir()
    (mounted / "lost+found").symlink_to(outside)
    clean(task("m"))
    assert list(mounted.iterdir()) == []
    assert (outside / "file").read_text() == "precious"


def test_an_entry_that_became_a_link_is_refused(
    ext4: Callable[[str], Path], tmp_path: Path, task: Callable[[str], MountTask]
) -> None:
    mounted = ext4("m")
    known = task("m")
    sh("umount", str(mounted))
    mounted.rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    mounted.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused):
        clean(known)
    assert (tmp_path / "elsewhere" / "file").exists()


def test_a_pod_that_still_has_it_mounted_keeps_it(
    ext4: Callable[[str], Path], disks: Any, tmp_path: Path, task: Callable[[str], MountTask]
) -> None:
    mounted = ext4("m")
    (mounted / "file").write_text("x")
    pod = tmp_path / "pods" / "uid" / "volumes" / "kubernetes.io~local-volume" / "pv"
    pod.parent.mkdir(parents=True)
    disks.mount(pod, "--bind", str(mounted))
    with pytest.raises(Refused, match="a pod has it mounted"):
        clean(task("m"))
    assert (mounted / "file").exists()
