"""Looking at directories: what becomes a candidate, what is noise, what is a duplicate."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_volume_provisioner import devices
from local_volume_provisioner.config import ClassConfig, VolumeMode
from local_volume_provisioner.duplicates import choose
from local_volume_provisioner.globs import Globs
from local_volume_provisioner.identity import Identity
from local_volume_provisioner.mounts import MountTable
from local_volume_provisioner.scan import Candidate, Inventory, Kind, Scanner

MIB = 1 << 20


def sh(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


@pytest.fixture
def entries(tmp_path: Path) -> Path:
    made = tmp_path / "entries"
    made.mkdir()
    return made


def a_class(entries: Path, name: str = "c", **fields: Any) -> ClassConfig:
    return ClassConfig(name=name, host_dir=str(entries), mount_dir=str(entries), **fields)


def scan(*classes: ClassConfig) -> Inventory:
    return Scanner().scan({kind.name: kind for kind in classes}, MountTable.read())


def names(inventory: Inventory) -> set[str]:
    return {Path(path).name for path in inventory.candidates}


def test_mounts_of_all_kinds(disks: Any, entries: Path) -> None:
    disk = disks.disk("a", 32 * MIB)
    sh("mkfs.ext4", "-q", disk.path)
    ext4 = disks.mount(entries / "ext4", disk.path)
    (ext4 / "sub").mkdir()
    disks.mount(entries / "bind", "--bind", str(ext4 / "sub"))
    disks.mount(entries / "tmpfs", "-t", "tmpfs", "-o", "size=8m", "none")
    disks.mount(entries / "with blank\tand tab", "-t", "tmpfs", "none")
    found = scan(a_class(entries))
    assert names(found) == {"ext4", "bind", "tmpfs", "with blank\tand tab"}
    by_name = {Path(path).name: one for path, (one,) in found.candidates.items()}
    assert by_name["tmpfs"].size == 8 * MIB
    assert by_name["bind"].root == "/sub"
    uuid = subprocess.run(
        ["blkid", "-s", "UUID", "-o", "value", disk.path], capture_output=True, text=True
    )
    assert by_name["ext4"].identity.file_system == uuid.stdout.strip()
    assert by_name["ext4"].identity.file_system == by_name["bind"].identity.file_system


def test_devices_by_link_and_by_node(disks: Any, entries: Path) -> None:
    disk = disks.disk("a")
    (entries / "link").symlink_to(disk.path)
    (entries / "far").symlink_to(entries / "link")
    os.mknod(entries / "node", 0o60600, disk.number)
    found = scan(a_class(entries, mode=VolumeMode.BLOCK))
    assert names(found) == {"link", "far", "node"}
    assert {one.number for (one,) in found.candidates.values()} == {disk.number}


def test_noise_is_ignored_and_nothing_of_it_is_opened(entries: Path) -> None:
    """L9, L10: a FIFO hung the reference, and one stray file kept it unready for ever."""
    os.mkfifo(entries / "fifo")
    (entries / "file").write_text("x")
    (entries / "lost+found").mkdir()
    (entries / ".hidden").mkdir()
    os.mknod(entries / "char", 0o20600, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(entries / "socket"))
        found = scan(a_class(entries))
    assert not found.candidates
    assert not found.class_problems
    assert not [note for note in found.notes.values() if note.is_problem]
    assert len(found.notes) == 6


def test_problems_are_told(disks: Any, entries: Path, tmp_path: Path) -> None:
    (entries / "dangling").symlink_to("/dev/no-such-disk")
    (entries / "to-directory").symlink_to(tmp_path)
    disks.mount(entries / "mounted", "-t", "tmpfs", "none")
    (entries / os.fsdecode(b"\xff")).mkdir()
    found = scan(a_class(entries, mode=VolumeMode.BLOCK))
    notes = {Path(n.path).name: n.text for n in found.notes.values() if n.is_problem}
    assert "which is not there" in notes["dangling"]
    assert "--bind" in notes["to-directory"]
    assert "volumeMode Block" in notes["mounted"]
    assert len(notes) == 4
    missing = scan(a_class(tmp_path / "nowhere"))
    assert "No such file" in missing.class_problems["c"]


def test_only_names_that_match_are_looked_at(disks: Any, entries: Path) -> None:
    for name in ("ssd-1", "hdd-1"):
        disks.mount(entries / name, "-t", "tmpfs", "none")
    assert names(scan(a_class(entries, globs=Globs.parse("ssd*, nvme*")))) == {"ssd-1"}


def test_a_device_in_use_is_not_offered(disks: Any, entries: Path, tmp_path: Path) -> None:
    """L2."""
    disk = disks.disk("a", 32 * MIB)
    sh("mkfs.ext4", "-q", disk.path)
    disks.mount(tmp_path / "m", disk.path)
    (entries / "a").symlink_to(disk.path)
    root = Path("/").stat().st_dev
    if Path(f"/sys/dev/block/{os.major(root)}:{os.minor(root)}").exists():
        os.mknod(entries / "root", 0o60400, root)
    found = scan(a_class(entries, mode=VolumeMode.BLOCK))
    assert found.candidates
    assert all("is mounted at" in one.busy for (one,) in found.candidates.values())


# -- duplicates


def chosen(*classes: ClassConfig) -> tuple[set[str], dict[str, str]]:
    found = scan(*classes)
    choice = choose((one for many in found.candidates.values() for one in many), lambda _: 0)
    duplicates = {Path(path).name: text for path, text in choice.duplicates.items()}
    return {Path(path).name for path in choice.chosen}, duplicates


def test_one_volume_for_a_device_with_many_names(disks: Any, entries: Path, tmp_path: Path) -> None:
    """L12: two names, two classes, a partition and its disk, a mount of it."""
    disk = disks.disk("a", 16 * MIB)
    table = "label: gpt\nstart=1MiB, size=6MiB\nstart=8MiB, size=6MiB\n"
    subprocess.run(["sfdisk", "-q", "--no-reread", disk.path], input=table, text=True, check=True)
    sh("partx", "--update", disk.path)
    sh("mkfs.ext4", "-q", f"{disk.path}p1")
    other = tmp_path / "other"
    other.mkdir()
    (entries / "whole").symlink_to(disk.path)
    (entries / "again").symlink_to(disk.path)
    (other / "p1").symlink_to(f"{disk.path}p1")
    (other / "p2").symlink_to(f"{disk.path}p2")
    block = {"mode": VolumeMode.BLOCK}
    kept, duplicates = chosen(a_class(entries, **block), a_class(other, "d", **block))
    assert kept == {"again"}
    assert duplicates.keys() == {"whole", "p1", "p2"}
    assert "same data as" in duplicates["p1"]
    kept, _ = chosen(a_class(other, "d", **block))
    assert kept == {"p1", "p2"}, "partitions beside each other share nothing"
    disks.mount(other / "mounted", f"{disk.path}p1")
    kept, duplicates = chosen(a_class(other))
    assert kept == {"mounted", "p2"}
    assert duplicates.keys() == {"p1"}


def test_one_volume_for_a_directory_and_what_is_in_it(disks: Any, entries: Path) -> None:
    backing = entries.parent / "backing"
    (backing / "a" / "b").mkdir(parents=True)
    (backing / "ab").mkdir()
    disks.mount(entries / "1", "--bind", str(backing / "a"))
    disks.mount(entries / "2", "--bind", str(backing / "a" / "b"))
    disks.mount(entries / "3", "--bind", str(backing / "ab"))
    disks.mount(entries / "4", "--bind", str(backing / "a"))
    kept, duplicates = chosen(a_class(entries))
    assert kept == {"1", "3"}
    assert duplicates.keys() == {"2", "4"}


def test_a_path_that_two_classes_want_is_one_volume(disks: Any, entries: Path) -> None:
    disks.mount(entries / "ssd", "-t", "tmpfs", "none")
    two = a_class(entries, "d", globs=Globs.parse("s*"))
    found = scan(a_class(entries), two)
    everything = [one for many in found.candidates.values() for one in many]
    assert len(everything) == 2
    choice = choose(everything, lambda one: 0 if one.class_config.name == "d" else 1)
    assert [one.class_config.name for one in choice.chosen.values()] == ["d"]
    assert not choice.duplicates


roots = st.sampled_from(["/", "/a", "/a/b", "/a/b/c", "/ab", "/b"])
CONFIG = ClassConfig(name="c", host_dir="/d", mount_dir="/d")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), roots), max_size=12), st.randoms())
def test_what_is_chosen_shares_nothing_and_nothing_is_left_out(specs: Any, random: Any) -> None:
    """Devices 0 (a disk) with 1 and 2 (its partitions), and 3."""
    families = {0: {0, 1, 2}, 1: {0, 1}, 2: {0, 2}, 3: {3}}
    candidates = [
        Candidate(
            class_config=CONFIG,
            entry=str(index),
            kind=Kind.MOUNT if is_mount else Kind.DEVICE,
            size=1,
            identity=Identity(kind="x"),
            number=number,
            family=frozenset(families[number]),
            root=root if is_mount else "",
        )
        for index, (is_mount, number, root) in enumerate(specs)
    ]

    def share(one: Candidate, other: Candidate) -> bool:
        if one.kind is other.kind is Kind.MOUNT and one.number == other.number:
            a, b = f"{one.root.rstrip('/')}/", f"{other.root.rstrip('/')}/"
            return a.startswith(b) or b.startswith(a)
        if one.kind is other.kind is Kind.MOUNT:
            return False
        return one.number in other.family

    kept = list(choose(candidates, lambda _: random.randint(0, 3)).chosen.values())
    for index, one in enumerate(kept):
        assert not any(share(one, other) for other in kept[index + 1 :])
    for one in candidates:
        assert any(one is other or share(one, other) for other in kept)


def test_what_lies_on_a_device_and_what_it_lies_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A logical volume on a partition: the disk below is no user of it. No such thing here, so by a
    tree as sysfs has it."""
    numbers = {"sda": "8:0", "sda1": "8:1", "dm-0": "253:0"}
    places = {"sda": tmp_path / "sda", "sda1": tmp_path / "sda/sda1", "dm-0": tmp_path / "dm-0"}
    links = tmp_path / "by-number"
    links.mkdir()
    for name, place in places.items():
        (place / "holders").mkdir(parents=True)
        (place / "slaves").mkdir()
        (place / "dev").write_text(numbers[name])
        (links / numbers[name]).symlink_to(place)
    (places["sda1"] / "partition").write_text("1")
    (places["sda1"] / "holders/dm-0").symlink_to(places["dm-0"])
    (places["dm-0"] / "slaves/sda1").symlink_to(places["sda1"])
    monkeypatch.setattr(devices, "SYSFS", links)
    disk, part, volume = os.makedev(8, 0), os.makedev(8, 1), os.makedev(253, 0)
    assert devices.above(devices.read(volume)) == {volume}
    assert devices.above(devices.read(part)) == {part, volume}
    assert devices.above(devices.read(disk)) == devices.family(devices.read(volume))
