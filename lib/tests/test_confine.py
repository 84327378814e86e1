"""Nothing leaves the base: by no text, by no link, by no link that appears in the middle."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_storage import confine
from external_storage.confine import Confined, check

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount and chown")


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


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- paths


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("", "empty path"),
        ((), "empty path"),
        ("/etc", "absolute"),
        ("a//b", "empty segment"),
        ("a/", "empty segment"),
        (("a", ""), "empty segment"),
        (".", "'.'"),
        ("a/./b", "'.'"),
        ("..", "'..'"),
        ("a/../b", "'..'"),
        (("a", "b/c"), "within the segment"),
        (("a", "../.."), "within the segment"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("a\x7f", "control character"),
        ("a\x85", "control character"),
        ("\ud800", "Unicode"),
        ("x" * 256, "256 bytes"),
        ("ä" * 128, "256 bytes"),
        ("/".join(["x" * 255] * 17), "at most 4096"),
    ],
)
def test_a_path_that_is_not_strictly_below_is_refused(
    path: confine.Relative, told: str, tree: Confined, base: Path
) -> None:
    calls = (check, tree.mkdir, tree.stat, tree.listdir, tree.remove_tree, tree.chown)
    for call in (*calls, lambda p: tree.rename(p, "x"), lambda p: tree.rename("x", p)):
        with pytest.raises(ValueError, match=told):
            call(path)
    assert list(base.iterdir()) == []


def test_the_longest_paths_are_allowed() -> None:
    assert check("ä" * 127) == ("ä" * 127,)
    assert len(check("/".join(["x" * 255] * 16))) == 16
    assert check(("a", "...", "-b", "c d")) == ("a", "...", "-b", "c d")


SEGMENTS = st.one_of(
    st.sampled_from(["..", ".", "", "a", "...", "~", "..\\", "\\..", "%2e%2e", "\u2024\u2024"]),
    st.text(max_size=8),
)


@given(st.one_of(st.text(), st.lists(SEGMENTS).map("/".join), st.lists(SEGMENTS).map(tuple)))
def test_no_text_ever_escapes(path: confine.Relative) -> None:
    try:
        parts = check(path)
    except ValueError:
        return
    joined = "/base/" + "/".join(parts)
    assert os.path.normpath(joined) == joined
    assert os.path.commonpath(["/base", joined]) == "/base"
    assert joined != "/base"


# -- what each call does


def test_mkdir_sets_exactly_the_mode_whatever_the_umask(tree: Confined, base: Path) -> None:
    before = os.umask(0o077)
    try:
        assert tree.mkdir("ns/claim", mode=0o2777, parents=True, parent_mode=0o711)
    finally:
        os.umask(before)
    assert mode_of(base / "ns/claim") == 0o2777
    assert mode_of(base / "ns") == 0o711


def test_mkdir_leaves_a_directory_that_is_there_as_it_is(tree: Confined, base: Path) -> None:
    (base / "old").mkdir(mode=0o700)
    (base / "old/data").touch()
    with pytest.raises(FileExistsError, match="old"):
        tree.mkdir("old", mode=0o777)
    assert not tree.mkdir("old", mode=0o777, exist_ok=True)
    assert not tree.mkdir("old", mode=0o777, parents=True, exist_ok=True)
    assert mode_of(base / "old") == 0o700


def test_mkdir_without_its_parent_is_an_error(tree: Confined) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        tree.mkdir("no/such/parent")
    assert caught.value.filename == "no"


@ROOT_ONLY
def test_mkdir_and_chown_set_owner_and_group(tree: Confined, base: Path) -> None:
    tree.mkdir("a", mode=0o2770, uid=1234, gid=5678)
    facts = (base / "a").stat()
    assert (facts.st_uid, facts.st_gid, stat.S_IMODE(facts.st_mode)) == (1234, 5678, 0o2770)
    tree.chown("a", gid=9999)
    facts = (base / "a").stat()
    assert (facts.st_uid, facts.st_gid) == (1234, 9999)


def test_chmod_stat_and_listdir(tree: Confined, base: Path) -> None:
    tree.mkdir("a")
    tree.mkdir("a/c")
    (base / "a/b").touch()
    tree.chmod("a", 0o3750)
    assert mode_of(base / "a") == 0o3750
    assert tree.listdir("a") == ["b", "c"]
    assert tree.listdir() == tree.listdir() == ["a"]
    assert stat.S_ISREG(tree.stat("a/b").st_mode)
    with tree.open_dir("a") as directory:
        assert os.fstat(directory).st_ino == (base / "a").stat().st_ino


def test_rename_moves_within_and_between_trees(tree: Confined, base: Path, tmp_path: Path) -> None:
    (tmp_path / "trash").mkdir()
    (base / "a/b").mkdir(parents=True)
    with Confined(tmp_path / "trash") as trash:
        tree.rename("a/b", "c")
        tree.rename("c", "c.1", to=trash)
    assert (tmp_path / "trash/c.1").is_dir()
    assert tree.listdir() == ["a"]


@pytest.mark.parametrize("kernel_can", [True, False])
@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_rename_replaces_nothing_unless_told(
    kernel_can: bool, kind: str, tree: Confined, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> None:
        raise OSError(errno.EINVAL, "as on NFS")

    if not kernel_can:
        monkeypatch.setattr(confine, "_renameat2", cannot)
    for name in ("old", "target"):
        if kind == "directory":
            (base / name).mkdir()
        elif kind == "link":
            (base / name).symlink_to(name + "-nowhere")
        else:
            (base / name).write_text(name)
    inode = (base / "old").lstat().st_ino
    with pytest.raises(FileExistsError) as caught:
        tree.rename("old", "target")
    assert (caught.value.filename, caught.value.filename2) == ("old", "target")
    tree.rename("old", "free")
    assert (base / "free").lstat().st_ino == inode
    tree.rename("free", "target", replace=True)
    assert (base / "target").lstat().st_ino == inode
    assert tree.listdir() == ["target"]


def test_remove_tree_removes_links_and_not_what_they_lead_to(
    tree: Confined, base: Path, outside: Path
) -> None:
    before = state_of(outside)
    (base / "a/b").mkdir(parents=True)
    (base / "a/b/file").touch()
    (base / "a/to-directory").symlink_to(outside)
    (base / "a/b/up").symlink_to("..")
    (base / "link").symlink_to(outside)
    assert tree.remove_tree("a")
    assert tree.remove_tree("link")
    assert tree.listdir() == []
    assert state_of(outside) == before


def test_remove_tree_of_nothing_is_done(tree: Confined) -> None:
    assert tree.remove_tree("never")
    assert tree.remove_tree("never/was/here")


def test_remove_tree_of_a_removed_base_is_not_taken_for_done(base: Path) -> None:
    with Confined(base) as tree:
        base.rmdir()
        with pytest.raises(OSError, match="base has been removed") as caught:
            tree.remove_tree("a")
    assert caught.value.errno == errno.ESTALE


def test_remove_tree_is_not_stopped_by_depth(tree: Confined, base: Path) -> None:
    deep = os.open(base, os.O_RDONLY)
    for _ in range(3000):  # more than Python's stack and a process's descriptors allow
        os.mkdir("d", dir_fd=deep)
        below = os.open("d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    assert tree.remove_tree("d")
    assert tree.listdir() == []


def test_remove_tree_stops_when_told_and_goes_on_later(tree: Confined, base: Path) -> None:
    (base / "a").mkdir()
    for number in range(10):
        (base / "a" / str(number)).touch()
    asked = iter(range(1000))
    assert not tree.remove_tree("a", stop=lambda: next(asked) >= 5)
    assert len(tree.listdir("a")) == 6  # the first question was about the directory itself
    assert tree.remove_tree("a", stop=lambda: False)
    assert tree.listdir() == []


def test_remove_tree_names_what_it_could_not_remove(
    tree: Confined, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / "a/b").mkdir(parents=True)
    (base / "a/b/c").touch()
    real = os.unlink

    def unlink(name: str, *, dir_fd: int) -> None:
        if name == "c":
            raise PermissionError(errno.EPERM, "no", name)
        real(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(PermissionError) as caught:
        tree.remove_tree("a")
    assert caught.value.filename == "a/b/c"


def test_remove_empty_parents_stops_at_what_is_not_empty_and_at_the_base(
    tree: Confined, base: Path
) -> None:
    (base / "keep/a/b").mkdir(parents=True)
    (base / "keep/data").touch()
    (base / "x/y").mkdir(parents=True)
    tree.remove_empty_parents("keep/a/b/gone")
    tree.remove_empty_parents("x/y/never/there")
    tree.remove_empty_parents("top")
    assert tree.listdir() == ["keep"]
    assert tree.listdir("keep") == ["data"]


def test_a_closed_tree_does_nothing(base: Path) -> None:
    tree = Confined(base)
    tree.close()
    tree.close()
    with pytest.raises(ValueError, match="closed"):
        tree.mkdir("a")


def test_no_descriptor_is_left_open(tree: Confined, base: Path, outside: Path) -> None:
    (base / "link").symlink_to(outside)
    before = open_descriptors()
    for _ in range(3):
        tree.mkdir("a/b/c", parents=True)
        tree.rename("a/b", "d")
        tree.chmod("d/c", 0o700)
        for call in (tree.mkdir, tree.listdir, tree.stat):
            with pytest.raises(NotADirectoryError):
                call("link/x")
        tree.remove_tree("a")
        tree.remove_tree("d")
    assert open_descriptors() == before


def test_a_snapshot_directory_that_goes_with_its_parent_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N27: some filers list a read-only ``.snapshot`` in every directory; it is in nobody's way.

    No file system of this machine has it: the calls of the system are made to say so.
    """
    (tmp_path / "tree/below").mkdir(parents=True)
    (tmp_path / "tree/file").touch()
    scandir, unlink = os.scandir, os.unlink

    class Listed:
        def __init__(self, directory: int) -> None:
            with scandir(directory) as entries:
                self.names = [entry.name for entry in entries] + [".snapshot"]

        def __enter__(self) -> Any:
            return (SimpleNamespace(name=name) for name in self.names)

        def __exit__(self, *_: object) -> None:
            pass

    def refuse(name: str, **where: Any) -> None:
        if name == ".snapshot":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        unlink(name, **where)

    failures: list[OSError] = []
    with Confined(tmp_path) as tree, monkeypatch.context() as patch:
        patch.setattr(os, "scandir", Listed)
        patch.setattr(os, "unlink", refuse)
        assert tree.remove_tree("tree", failures=failures)
    assert failures == []
    assert list(tmp_path.iterdir()) == []
