"""Volumes' directories: idempotent, exact modes, no links followed, emptied behind the scenes."""

from __future__ import annotations

import os
import stat

import pytest

from nfs_provisioner.directories import RootInUse, VolumeDirectories, check_name


@pytest.fixture
def directories(root) -> VolumeDirectories:
    directories = VolumeDirectories(root, root / ".state")
    directories.prepare()
    return directories


def _mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_mode_is_exact_whatever_the_umask(directories, umask) -> None:
    before = os.umask(umask)
    try:
        path = directories.create("pvc-a", mode=0o2775, gid=None)
    finally:
        os.umask(before)
    assert _mode(path) == 0o2775


@pytest.mark.skipif(os.geteuid() != 0, reason="giving away a group takes root")
def test_group_is_set_with_the_set_gid_bit(directories) -> None:
    path = directories.create("pvc-a", mode=0o2770, gid=1234)
    assert (path.stat().st_gid, path.stat().st_uid, _mode(path)) == (1234, 0, 0o2770)


def test_create_again_keeps_the_content_and_sets_the_mode(directories) -> None:
    path = directories.create("pvc-a", mode=0o700, gid=None)
    (path / "data").write_text("kept")
    inode = path.stat().st_ino
    directories.create("pvc-a", mode=0o770, gid=os.getegid())
    assert (path / "data").read_text() == "kept"
    assert (path.stat().st_ino, _mode(path)) == (inode, 0o770)


def test_link_or_file_in_the_place_is_refused_and_untouched(directories, root) -> None:
    target = root / "elsewhere"
    target.mkdir(mode=0o700)
    (root / "pvc-link").symlink_to(target)
    (root / "pvc-file").write_text("x")
    (root / "pvc-dangling").symlink_to("/nowhere")
    for name in ("pvc-link", "pvc-file", "pvc-dangling"):
        with pytest.raises(NotADirectoryError, match=f"in the place of the volume {name}"):
            directories.create(name, mode=0o777, gid=None)
    assert _mode(target) == 0o700


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".state", "a/b", "/a", "a\0b", "a\n", "A", "ä", "a b", "a_b", "x" * 254],
)
def test_bad_names_are_refused_everywhere(directories, root, name) -> None:
    before = sorted(root.iterdir())
    for act in (
        check_name,
        directories.path,
        directories.trash,
        lambda n: directories.create(n, mode=0o700, gid=None),
    ):
        with pytest.raises(ValueError, match="not a volume name"):
            act(name)
    assert sorted(root.iterdir()) == before


def test_trash_moves_and_is_idempotent(directories, root) -> None:
    path = directories.create("pvc-a", mode=0o700, gid=None)
    (path / "data").write_text("x")
    first = directories.trash("pvc-a")
    assert not path.exists()
    assert first.parent == root / ".state/trash"
    assert (first / "data").read_text() == "x"
    assert directories.trash("pvc-a") is None
    directories.create("pvc-a", mode=0o700, gid=None)
    second = directories.trash("pvc-a")
    assert second != first
    assert second.exists()
    assert directories.empty_trash() == []
    assert list((root / ".state/trash").iterdir()) == []
    assert directories.empty_trash() == []


def test_the_longest_name_fits_into_the_trash(directories) -> None:
    name = "x" * 253
    directories.create(name, mode=0o700, gid=None)
    assert directories.trash(name).exists()


def test_emptying_follows_no_links(directories, root) -> None:
    outside = root / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    path = directories.create("pvc-a", mode=0o700, gid=None)
    (path / "up").symlink_to(outside)
    (path / "deep").mkdir()
    (path / "deep/link").symlink_to(outside / "precious")
    directories.trash("pvc-a")
    (root / "pvc-link").symlink_to(outside)
    assert directories.trash("pvc-link").is_symlink()
    assert directories.empty_trash() == []
    assert (outside / "precious").read_text() == "x"


def test_one_entry_that_cannot_go_does_not_stop_the_others(
    directories, root, monkeypatch, caplog
) -> None:
    trashed = {}
    for name in ("pvc-a", "pvc-stuck", "pvc-z"):
        (directories.create(name, mode=0o700, gid=None) / "data").write_text("x")
        trashed[name] = directories.trash(name)
    unlink = os.unlink
    stuck_inode = (trashed["pvc-stuck"] / "data").stat().st_ino

    def busy(path, *, dir_fd=None) -> None:
        if os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_ino == stuck_inode:
            raise OSError(16, "Device or resource busy", path)
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", busy)
    assert directories.empty_trash() == [trashed["pvc-stuck"].name]
    assert "could not remove" in caplog.text
    monkeypatch.undo()
    assert directories.empty_trash() == []


def test_a_tree_deeper_than_any_recursion_is_removed(directories) -> None:
    deep = directories.create("pvc-deep", mode=0o700, gid=None)
    descriptor = os.open(deep, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    directories.create("pvc-next", mode=0o700, gid=None)
    directories.trash("pvc-deep")
    directories.trash("pvc-next")
    assert directories.empty_trash() == []
    assert directories.trash_entries() == 0


def test_only_one_process_has_the_root(directories, root) -> None:
    second = VolumeDirectories(root, root / ".state")
    with pytest.raises(RootInUse, match="another nfs-provisioner"):
        second.prepare()
    directories.release()
    second.prepare()
    second.release()


def test_state_directory_is_closed_and_ours(root) -> None:
    state = root / ".state"
    state.mkdir(mode=0o777)
    state.chmod(0o777)
    VolumeDirectories(root, state).prepare()
    assert _mode(state) == 0o700
    assert state.stat().st_uid == os.geteuid()


@pytest.mark.skipif(os.geteuid() != 0, reason="giving away a directory takes root")
def test_state_directory_of_somebody_else_is_refused(root) -> None:
    (root / ".state").mkdir()
    os.chown(root / ".state", 1000, 1000)
    with pytest.raises(PermissionError, match="belongs to uid 1000"):
        VolumeDirectories(root, root / ".state").prepare()


def test_links_to_the_root_or_the_state_are_refused(root) -> None:
    (root / "real").mkdir()
    (root / "link").symlink_to(root / "real")
    with pytest.raises(ValueError, match="has a link in it, use"):
        VolumeDirectories(root / "link", root / "link/.state").prepare()
    (root / "real/.state").symlink_to(root)
    with pytest.raises(OSError, match=r"\.state"):
        VolumeDirectories(root / "real", root / "real/.state").prepare()
