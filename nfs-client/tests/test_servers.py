"""The file of servers: read strictly, with all of its problems at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from external_storage.shares.location import join
from nfs_client_provisioner.servers import (
    OvercommitAction,
    Server,
    only_server,
    read_servers,
)

GOOD = """
servers:
  fast:
    server: nfs1.example.com
    path: /exports/fast/
    mountPoint: /mnt/fast
    mountOptions: [nfsvers=4.2, hard]
    overcommit: 1.5
    overcommitAction: warn
  bulk:
    server: "[fd00::1]"
    path: /
"""


def read(tmp_path: Path, text: str) -> tuple[list[Server], list[str]]:
    file = tmp_path / "servers.yaml"
    file.write_text(text)
    return read_servers(file)


def problems(tmp_path: Path, entry: str) -> list[str]:
    """Those of a file with one server, ``one``, whose keys are given in flow style."""
    return read(tmp_path, f"servers:\n  one: {entry}\n")[1]


def test_a_file_of_two_servers_is_read(tmp_path: Path) -> None:
    servers, found = read(tmp_path, GOOD)
    assert found == []
    fast, bulk = servers
    assert fast == Server(
        name="fast",
        server="nfs1.example.com",
        path="/exports/fast",
        mount_point=Path("/mnt/fast"),
        mount_options=("nfsvers=4.2", "hard"),
        overcommit=1.5,
        overcommit_action=OvercommitAction.WARN,
    )
    assert (bulk.path, bulk.mount_point) == ("/", Path("/persistentvolumes/bulk"))
    assert (bulk.fs_types, bulk.overcommit) == (("nfs", "nfs4"), None)


def test_the_kubelet_puts_the_brackets_around_an_ipv6_address(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD)[0][1].server == "fd00::1"


def test_all_problems_are_told_at_once_with_the_servers_name(tmp_path: Path) -> None:
    text = """
servers:
  one: {server: "not a host", path: relative, mountPoint: /, color: blue}
  Two: {path: /x, mountOptions: "nfsvers=4", overcommit: 0, overcommitAction: shrug}
"""
    servers, found = read(tmp_path, text)
    assert servers == []
    assert [problem.split(": ", 2)[1:] for problem in found] == [
        [
            "server 'one'",
            "unknown 'color'; there are server, path, mountPoint, mountOptions, "
            "fsTypes, source, overcommit, overcommitAction",
        ],
        ["server 'one'", "server: 'not a host' is no host name or IP address"],
        ["server 'one'", "path: 'relative' is not absolute"],
        ["server 'one'", "mountPoint: '/' is not an absolute directory below /"],
        ["server 'Two'", "the name is not of a-z, 0-9 and '-', at most 63"],
        ["server 'Two'", "server: must be given"],
        ["server 'Two'", "mountOptions: 'nfsvers=4' is not a list of words"],
        ["server 'Two'", "overcommit: 0 is not a number above 0"],
        ["server 'Two'", "overcommitAction: 'shrug' is not one of: refuse, warn"],
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "want one key, 'servers'"),
        ("servers: {}", "at least one"),
        ("servers: [a]", "at least one"),
        ("servers: {a: {}}\nother: 1", "want one key"),
        ("servers: [", "is not YAML"),
        ("servers:\n  a: {server: h, path: /a}\n  a: {server: h, path: /b}", "'a' is given twice"),
        ("servers:\n  a: {server: h, path: /a, path: /b}", "'path' is given twice"),
        ("servers:\n  a: !!python/object:os.system {}", "is not YAML"),
        ("servers:\n  a: 1", "is to be a map"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path: Path, text: str, said: str) -> None:
    servers, found = read(tmp_path, text)
    assert servers == []
    assert any(said in problem for problem in found), found


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    assert read_servers(tmp_path / "none")[1] == [
        f"{tmp_path / 'none'} cannot be read: No such file or directory"
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{server: h, path: 5}", "path: 5 is not text"),
        ("{server: h, path: /a/../b}", "has '..'"),
        ("{server: h, path: /a, fsTypes: [1]}", "fsTypes: [1] is not a list of words"),
        ("{server: h, path: /a, overcommit: true}", "overcommit: True is not a number"),
        ("{server: h, path: /a, mountPoint: /a/../..}", "mountPoint"),
        ("{server: h, path: /a, mountOptions: ['a b']}", "mountOptions"),
    ],
)
def test_a_bad_value_is_refused(tmp_path: Path, value: str, said: str) -> None:
    assert any(said in problem for problem in problems(tmp_path, value))


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ("{server: h, path: /a}", "{server: H., path: /a/}", "overlap"),
        ("{server: h, path: /a}", "{server: h, path: /a/b}", "overlap"),
        ("{server: h, path: /}", "{server: h, path: /a}", "overlap"),
        ("{server: 'fd00::1', path: /a}", "{server: '[FD00:0::1]', path: /a}", "overlap"),
        (
            "{server: h, path: /a, mountPoint: /m}",
            "{server: i, path: /a, mountPoint: /m}",
            "same mountPoint",
        ),
    ],
)
def test_two_servers_that_are_one_are_refused(
    tmp_path: Path, one: str, other: str, said: str
) -> None:
    found = read(tmp_path, f"servers:\n  one: {one}\n  other: {other}\n")[1]
    assert len(found) == 1
    assert said in found[0]


def test_servers_side_by_side_are_not_refused(tmp_path: Path) -> None:
    text = "servers:\n  a: {server: h, path: /a}\n  b: {server: h, path: /ab}\n"
    assert read(tmp_path, text)[1] == []


@pytest.mark.parametrize("base", ["/", "/a/", "/a//b", "/a"])
def test_n22_the_path_of_a_volume_leads_back_to_its_directory_whatever_nfs_path_is(
    base: str,
) -> None:
    server = only_server("h", base, Path("/persistentvolumes"))
    path = join(server.path, "ns-data-pv")
    assert "//" not in path
    assert server.relative(path) == "ns-data-pv"
    # As nfs-subdir would have written it in some of its releases.
    assert server.relative(f"{base}/ns-data-pv") == "ns-data-pv"


@pytest.mark.parametrize(
    "path",
    [
        "/exports",
        "/exports/",
        "/exports2/x",
        "/other/exports/x",
        "exports/x",
        "",
        "/",
        "/exports/../etc",
        "/exports/a/..",
    ],
)
def test_n22_a_path_that_is_not_below_nfs_path_is_no_directory_of_ours(path: str) -> None:
    assert only_server("h", "/exports", Path("/p")).relative(path) is None
