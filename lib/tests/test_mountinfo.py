"""/proc/<pid>/mountinfo, read exactly."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_storage import mountinfo
from external_storage.mountinfo import Mount, find, mount_id, of_descriptor, parse_line, read

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
PLAIN = rb"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue"


@contextmanager
def mounted(*arguments: str | Path) -> Iterator[None]:
    subprocess.run(["mount", *arguments], check=True, timeout=60)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", arguments[-1]], check=True, timeout=60)


def test_every_field_of_the_manual_pages_example() -> None:
    assert parse_line(PLAIN) == Mount(
        mount_id=36,
        parent_id=35,
        major=98,
        minor=0,
        root="/mnt1",
        mount_point="/mnt2",
        options=("rw", "noatime"),
        optional_fields=("master:1",),
        fs_type="ext3",
        source="/dev/root",
        super_options=("rw", "errors=continue"),
    )


@pytest.mark.parametrize("fields", [[], ["shared:1"], ["shared:1", "master:2", "unbindable"]])
def test_any_number_of_optional_fields(fields: list[str]) -> None:
    line = " ".join(["1 0 0:1 / / rw", *fields, "- tmpfs tmpfs rw"])
    assert parse_line(line.encode()).optional_fields == tuple(fields)


def test_a_name_that_is_a_dash_is_no_separator() -> None:
    mount = parse_line(rb"1 0 0:1 - - rw - - - ro")
    assert (mount.root, mount.mount_point, mount.fs_type, mount.source) == ("-", "-", "-", "-")
    assert mount.read_only


def test_an_empty_source_and_bare_spaces_in_super_options() -> None:
    mount = parse_line(rb"1 0 0:1 / /a ro - tmpfs  rw,user=a b")
    assert mount.source == ""
    assert mount.super_options == ("rw", "user=a b")
    assert mount.read_only  # of this mount only


def test_a_comma_that_was_escaped_is_part_of_its_option() -> None:
    mount = parse_line(rb"1 0 0:1 / /a rw - overlay overlay rw,lowerdir=/a\054b")
    assert mount.super_options == ("rw", "lowerdir=/a,b")


def escape(data: bytes) -> bytes:
    """As the kernel's mangle_path does."""
    return b"".join(b"\\%03o" % c if c in b" \t\n\\#" else bytes([c]) for c in data)


@given(st.lists(st.binary(min_size=1).map(lambda b: b.replace(b"\0", b"")), min_size=3, max_size=3))
def test_escapes_round_trip(names: list[bytes]) -> None:
    root, point, source = (escape(name) for name in names)
    mount = parse_line(b"1 0 0:1 /%s /%s rw - nfs4 %s rw" % (root, point, source))
    read_back = [os.fsencode(text) for text in (mount.root, mount.mount_point, mount.source)]
    assert read_back == [b"/" + names[0], b"/" + names[1], names[2]]


@pytest.mark.parametrize(
    "line",
    [
        b"garbage",
        b"1 0 0:1 / / rw tmpfs tmpfs rw",  # no separator
        b"1 0 0:1 / / rw - tmpfs tmpfs",  # no super options
        b"x 0 0:1 / / rw - tmpfs tmpfs rw",
        b"1 0 01 / / rw - tmpfs tmpfs rw",
        b"1 0 0:-1 / / rw - tmpfs tmpfs rw",
    ],
)
def test_a_malformed_line_is_reported_and_skipped(
    line: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda _: line + b"\n" + PLAIN + b"\n")
    assert [mount.mount_id for mount in read()] == [36]
    assert [record.getMessage() for record in caplog.records] == ["a line of mountinfo is left out"]


@given(st.binary())
def test_no_line_does_anything_but_parse_or_raise_value_error(line: bytes) -> None:
    try:
        parse_line(line)
    except ValueError:
        return


def test_the_real_table_of_this_process() -> None:
    mounts = read()
    assert mounts == read(os.getpid())
    assert any(mount.mount_point == "/proc" and mount.fs_type == "proc" for mount in mounts)


def test_a_descriptor_tells_its_mount(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        mount = of_descriptor(file.fileno())
        assert mount.mount_id == mount_id(file.fileno())
        assert mount == find(tmp_path)
    with Path("/proc/self/status").open() as file:
        assert of_descriptor(file.fileno()).fs_type == "proc"
    with pytest.raises(OSError, match="Bad file descriptor"):
        of_descriptor(10**6)


def test_without_proc_it_is_no_missing_file_of_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_: Path) -> bytes:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_bytes", gone)
    with (tmp_path / "file").open("w") as file, pytest.raises(OSError, match="/proc") as caught:
        mount_id(file.fileno())
    assert not isinstance(caught.value, FileNotFoundError)


def table(*rows: tuple[int, int, str]) -> list[Mount]:
    return [
        parse_line(f"{number} {parent} 0:{number} / {point} rw - tmpfs tmpfs rw".encode())
        for number, parent, point in rows
    ]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", 10),
        ("/a", 14),
        ("/a/", 14),
        ("/a/b", 14),  # 12 is hidden below 14
        ("/a/b/c/d", 14),
        ("/ab", 10),
        ("//d/e", 13),
        ("/d/f/x", 15),
    ],
)
def test_find_walks_as_the_kernel_does(path: str, expected: int) -> None:
    mounts = table(
        (12, 11, "/a/b"), (15, 13, "/d/f"), (10, 1, "/"), (11, 10, "/a"), (13, 10, "/d"),
        (14, 11, "/a"),
    )  # fmt: skip
    assert find(path, mounts=mounts).mount_id == expected


@pytest.mark.parametrize("path", ["", "a", "/a/../b", "./a"])
def test_find_wants_an_absolute_path(path: str) -> None:
    with pytest.raises(ValueError, match="absolute"):
        find(path)


def test_find_in_a_table_without_a_root_is_told() -> None:
    with pytest.raises(LookupError, match="root"):
        find("/a", mounts=table((11, 10, "/a")))


@ROOT_ONLY
@pytest.mark.parametrize("source", ["a b#\\040\tc", "server:/path", "none"])
def test_real_mounts_with_odd_names(tmp_path: Path, source: str) -> None:
    point = tmp_path / "sp ace\ttab\nnewline\\134 ü"
    point.mkdir()
    with mounted("-t", "tmpfs", "-o", "ro,size=64k", source, point):
        descriptor = os.open(point, os.O_RDONLY)
        try:
            mount = of_descriptor(descriptor)
            assert (mount.mount_point, mount.source, mount.fs_type) == (str(point), source, "tmpfs")
            assert mount.read_only
            assert "size=64k" in mount.super_options
            assert mount.device == os.fstat(descriptor).st_dev
            assert find(point / "below") == mount
            assert find(tmp_path) != mount
        finally:
            os.close(descriptor)


@ROOT_ONLY
def test_mounts_over_each_other_and_one_that_is_gone(tmp_path: Path) -> None:
    with mounted("-t", "tmpfs", "lower", tmp_path):
        lower = os.open(tmp_path, os.O_RDONLY)
        try:
            with mounted("-t", "tmpfs", "upper", tmp_path):
                assert of_descriptor(lower).source == "lower"
                assert find(tmp_path).source == "upper"
            assert find(tmp_path).source == "lower"
            subprocess.run(["umount", "-l", tmp_path], check=True, timeout=60)
            try:
                with pytest.raises(LookupError, match="not mounted anywhere"):
                    mountinfo.of_descriptor(lower)
            finally:
                subprocess.run(["mount", "-t", "tmpfs", "again", tmp_path], check=True, timeout=60)
        finally:
            os.close(lower)
