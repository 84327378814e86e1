"""Settings and class parameters, those of nfs-subdir-external-provisioner among them."""

from __future__ import annotations

from pathlib import Path

import pytest

from external_storage import Problems
from nfs_client_provisioner.parameters import NfsClientParameters, OnDelete
from nfs_client_provisioner.settings import NfsClientSettings


def settings(**texts: str) -> NfsClientSettings:
    given = {"provisioner_name": "example.com/nfs", "nfs_server": "h", "nfs_path": "/e"}
    return NfsClientSettings.from_texts({**given, **texts})


def parameters(**given: str) -> NfsClientParameters:
    return NfsClientParameters.from_class(given)


def test_the_environment_of_nfs_subdir_is_enough() -> None:
    names = {info.env: info.name for info in NfsClientSettings.fields()}
    environment = {
        "NFS_SERVER": "nfs.example.com",
        "NFS_PATH": "/exports/k8s/",
        "PROVISIONER_NAME": "cluster.local/nfs-subdir-external-provisioner",
        "KUBECONFIG": "/kubeconfig",
        "ENABLE_LEADER_ELECTION": "false",
    }
    made = NfsClientSettings.from_texts({names[k]: v for k, v in environment.items()})
    (server,) = made.read_servers()
    assert (server.name, server.server, server.path) == (
        "default",
        "nfs.example.com",
        "/exports/k8s",
    )
    assert server.mount_point == Path("/persistentvolumes")
    assert made.kubeconfig == "/kubeconfig"
    assert not made.leader_elect


def test_our_own_name_of_a_setting_wins_over_that_of_nfs_subdir() -> None:
    assert settings(enable_leader_election="false", leader_elect="true").leader_elect
    assert settings(enable_leader_election="true").leader_elect
    assert settings().leader_elect


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(Problems) as caught:
        settings(
            nfs_server="a b",
            nfs_path="e",
            mount_point="/",
            call_timeout="5m",
            archive_retention="0",
        )
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "--nfs-server",
        "--nfs-path",
        "--mount-point",
        "--archive-retention",
        "--call-timeout",
    ]


def test_no_server_and_both_ways_to_name_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Problems, match="--nfs-server, --nfs-path: give both"):
        settings(nfs_path="")
    file = tmp_path / "servers.yaml"
    file.write_text("servers: {a: {server: h, path: relative}}")
    with pytest.raises(Problems) as caught:
        settings(servers=str(file))
    assert caught.value.problems == [
        "--servers: give either it or --nfs-server and --nfs-path",
        f"--servers: {file}: server 'a': path: 'relative' is not absolute",
    ]


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ({}, OnDelete.ARCHIVE),
        ({"archiveOnDelete": "true"}, OnDelete.ARCHIVE),
        ({"archiveOnDelete": "false"}, OnDelete.DELETE),
        ({"archiveOnDelete": "0"}, OnDelete.DELETE),
        ({"onDelete": "", "archiveOnDelete": "F"}, OnDelete.DELETE),
        ({"onDelete": "delete"}, OnDelete.DELETE),
        ({"onDelete": "retain", "archiveOnDelete": "false"}, OnDelete.RETAIN),
        ({"ondelete": "archive", "archiveondelete": "false"}, OnDelete.ARCHIVE),
    ],
)
def test_the_policy_is_the_one_that_nfs_subdir_would_have(
    given: dict[str, str], policy: OnDelete
) -> None:
    assert parameters(**given).policy is policy


@pytest.mark.parametrize(
    ("text", "policy"),
    [("Delete", OnDelete.DELETE), ("RETAIN", OnDelete.RETAIN), (" Archive ", OnDelete.ARCHIVE)],
)
def test_n24_on_delete_is_read_without_regard_to_case(text: str, policy: OnDelete) -> None:
    assert parameters(onDelete=text).policy is policy


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"onDelete": "remove"}, "'onDelete'.*not one of: delete, retain, archive"),
        ({"archiveOnDelete": "maybe"}, "'archiveOnDelete'.*neither true nor false"),
        ({"pathPattern": "${.PVC.nam}"}, "'pathPattern'.*is not known"),
        ({"pathPattern": "/${.PVC.name}"}, "'pathPattern'.*is absolute"),
        ({"pathPattern": ".external-storage/x"}, "'pathPattern'.*reserved"),
        ({"gid": "staff"}, "'gid'.*or auto, none, a pattern"),
        ({"gid": "0"}, "'gid'.*root's group"),
        ({"gid": "4294967295"}, "'gid'.*not a number from 0 to 4294967294"),
        ({"gid": "${.PVC.gid}"}, "'gid'.*is not known"),
        ({"uid": "-1"}, "'uid'.*not a number"),
        ({"mode": "0888"}, "'mode'.*octal"),
        ({"mode": "17777"}, "'mode'.*octal"),
        ({"gidMin": "100"}, "'gidMin'.*not within"),
        ({"gidMin": "5000", "gidMax": "4000"}, "'gidMin'.*above gidMax"),
        ({"archiveRetention": "0s"}, "'archiveRetention'.*above 0"),
        ({"shard": "true"}, "unknown parameter 'shard'.*allowed parameters: adopt, archive"),
        ({"Shared": "true", "shared": "true"}, "given twice"),
    ],
)
def test_n24_a_bad_or_unknown_parameter_is_refused_before_anything_is_made(
    given: dict[str, str], said: str
) -> None:
    with pytest.raises(Problems, match=said):
        parameters(**given)


def test_an_empty_pattern_is_the_default_as_in_nfs_subdir() -> None:
    assert parameters(pathPattern="").template() == parameters().template()
