"""Where a mount is, as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from external_storage.mountinfo import Mount
from external_storage.shares import location
from external_storage.shares.location import Expected


def mount(source: str, root: str = "/", point: str = "/mnt") -> Mount:
    return Mount(
        mount_id=1,
        parent_id=0,
        major=0,
        minor=1,
        root=root,
        mount_point=point,
        options=("rw",),
        optional_fields=(),
        fs_type="nfs4",
        source=source,
        super_options=("rw",),
    )


@pytest.mark.parametrize(
    ("server", "path", "source", "root", "place"),
    [
        ("nas", "/data", "nas:/data", "/", "/mnt"),
        ("nas", "/data/", "nas:/data", "/", "/mnt"),
        ("nas", "/data", "nas:/data/", "/", "/mnt"),
        ("NAS.example.com", "//data//a/", "nas.example.com:/data/a", "/", "/mnt"),
        ("nas", "/", "nas:/", "/", "/mnt"),
        ("nas", "/data/a/b", "nas:/", "/", "/mnt/data/a/b"),
        ("nas", "/data/a/b", "nas:/data", "/", "/mnt/a/b"),
        ("nas", "/data/a/b", "nas:/data", "/a", "/mnt/b"),
        ("10.0.0.1", "/data", "10.0.0.1:/data", "/", "/mnt"),
        ("fd00::1", "/data", "[fd00::1]:/data", "/", "/mnt"),
        ("[fd00:0:0::1]", "/data", "[fd00::1]:/data", "/", "/mnt"),
    ],
)
def test_an_nfs_mount_is_where_it_says(
    server: str, path: str, source: str, root: str, place: str
) -> None:
    expected = location._parts(Expected.nfs(server, path).source)
    assert location._location(mount(source, root), Path(place)) == expected


@pytest.mark.parametrize(
    ("server", "path", "source", "place"),
    [
        ("nas", "/data", "other:/data", "/mnt"),
        ("nas", "/data", "nas:/data2", "/mnt"),
        ("nas", "/data", "nas:/data/a", "/mnt"),
        ("nas", "/data", "nas:/", "/mnt"),
        ("nas", "/data", "nas:/data", "/mnt/a"),
        ("fd00::1", "/data", "[fd00::2]:/data", "/mnt"),
    ],
)
def test_another_place_is_not_taken_for_it(server: str, path: str, source: str, place: str) -> None:
    expected = location._parts(Expected.nfs(server, path).source)
    assert location._location(mount(source), Path(place)) != expected


@pytest.mark.parametrize(
    ("source", "root", "place"),
    [("/dev/vdb", "/", "/mnt"), ("/dev/vdb:/srv/a", "/srv", "/mnt/a"), ("Pool/Data", "/", "/mnt")],
)
def test_a_mount_without_a_server_is_where_it_says(source: str, root: str, place: str) -> None:
    device = source.partition(":/")[0]
    assert location._location(mount(device, root), Path(place)) == location._parts(source)


@pytest.mark.parametrize(
    ("base", "path", "relative"),
    [
        ("/data", "/data/a/b", "a/b"),
        ("/data/", "/data/a/", "a"),
        ("/", "/a/b", "a/b"),
        ("//a//b", "/a/b/c", "c"),
        ("/data", "/data", None),
        ("/data", "/data/", None),
        ("/data", "/data2/a", None),
        ("/data", "/other/data/a", None),
        ("/data", "/data/../etc", None),
        ("/data", "data/a", None),
        ("/", "/", None),
    ],
)
def test_what_is_below_a_directory_is_told_by_whole_segments(
    base: str, path: str, relative: str | None
) -> None:
    """N22."""
    assert location.below(base, path) == relative
    if relative is not None:
        assert location.join(base, relative) == location.server_path(path)


def test_spellings_of_one_server() -> None:
    assert location.same_server("NAS.example.com.", "nas.example.com")
    assert location.same_server("[fd00::1]", "fd00:0::1")
    assert not location.same_server("nas", "nas2")


@pytest.mark.parametrize("path", ["data", "", "/a/../b", ".."])
def test_a_path_of_a_server_that_is_not_absolute_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="absolute"):
        location.server_path(path)
