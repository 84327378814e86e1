"""What a class and an admin may say, and what is told of what they may not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efs_provisioner import access_point_path, tags
from efs_provisioner.file_systems import read
from efs_provisioner.parameters import EfsParameters, Mode
from efs_provisioner.settings import EfsSettings
from external_storage import Problems

# As the API reference has it.
AWS_PATH = re.compile(r"^(\/|(\/(?!\.)+[^$#<>;`|&?{}^*/\n]+){1,4})$")


def test_without_parameters_a_class_is_efs_provisioners() -> None:
    parameters = EfsParameters.from_class({})
    assert parameters.provisioning_mode is Mode.DIRECTORY
    assert parameters.allocates_gid
    assert parameters.gid_range == (2000, 2**31 - 1)


def test_the_limits_of_access_points_are_not_those_of_directories() -> None:
    path = "/".join("directory" for _ in range(12))
    assert EfsParameters.from_class({"basePath": path}).base_path == path


@pytest.mark.parametrize("text", ["true", "T", "1", "TRUE", "True", "t"])
def test_the_booleans_of_old_are_understood(text: str) -> None:
    assert EfsParameters.from_class({"GIDALLOCATE": text}).gid_allocate


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"provisioningMode": "efs"}, "efs-dir, efs-ap"),
        ({"fileSystemId": "data"}, "fs- and 8 to 40"),
        ({"gidMin": "1999"}, "'gidMin': 1999 is not within 2000"),
        ({"gidMin": "3000", "gidMax": "2000"}, "'gidMin': 3000 is above gidMax, 2000"),
        ({"gidRangeStart": "1", "gidRangeEnd": "2"}, "'gidRangeStart': is for.*efs-ap only"),
        ({"provisioningMode": "efs-ap", "gidMin": "3000"}, "'gidMin': is for.*efs-dir only"),
        ({"provisioningMode": "efs-ap", "gidRangeStart": "1"}, "give it and gidRangeEnd"),
        ({"directoryPerms": "0999"}, "'directoryPerms': '0999' is not octal"),
        ({"basePath": "/a/../b"}, "'basePath'"),
        ({"basePath": "/a//b"}, "'basePath'"),
        ({"provisioningMode": "efs-ap", "basePath": "/a//b"}, "'basePath'.*empty directory name"),
        ({"provisioningMode": "efs-ap", "basePath": "/a/b/c/d/e"}, "'basePath'.*5 levels"),
        ({"subPathPattern": "../${.PVC.name}"}, "'subPathPattern'"),
        ({"subPathPattern": "${.PVC.nmae}"}, r"'subPathPattern'.*is not known"),
        ({"subPathPattern": ".external-storage/x"}, "'subPathPattern'.*reserved"),
        ({"ensureUniqueDirectory": "false"}, "'ensureUniqueDirectory'.*needs a subPathPattern"),
        ({"uid": "4294967295"}, "'uid': 4294967295"),
        ({"az": "US East"}, "'az'"),
        ({"provisioningMode": "efs-ap", "tags": "aws:x:y"}, "'tags'"),
        ({"onDelete": "erase"}, "delete, archive, retain"),
        ({"reuseAccessPoint": "true"}, "unknown parameter 'reuseAccessPoint'.*allowed"),
    ],
)
def test_what_a_class_may_not_say_is_told(wrong: dict[str, str], told: str) -> None:
    with pytest.raises(Problems, match=told):
        EfsParameters.from_class(wrong)


@pytest.mark.parametrize(
    "path",
    ["/", "", "relative", "/a/", "//a", "/.a", "/a/..", "/a$", "/a/b/c/d/e", "/" + "x" * 100]
    + [f"/a{character}b" for character in "#<>;`|&?{}^*\n"],
)
def test_no_path_that_aws_refuses_and_no_root_is_asked_for(path: str) -> None:
    with pytest.raises(ValueError, match=r"AWS takes|absolute|empty|given to nobody"):
        access_point_path.check(path)


@given(st.text(max_size=110).map(lambda text: "/" + text))
def test_what_is_let_through_is_what_aws_takes(path: str) -> None:
    try:
        checked = access_point_path.check(path)
    except ValueError:
        return
    assert AWS_PATH.fullmatch(checked)
    assert checked != "/"
    assert len(checked) <= 100


@given(st.lists(st.sampled_from(["a", "b", "aa"]), min_size=1, max_size=4))
def test_a_directory_overlaps_itself_and_its_parents_only(parts: list[str]) -> None:
    path = "/" + "/".join(parts)
    assert access_point_path.overlap(path, path)
    assert access_point_path.overlap("/", path)
    assert access_point_path.overlap(path, f"{path}/below")
    assert not access_point_path.overlap(path, f"{path}a")


def test_tags_are_written_as_the_drivers() -> None:
    assert tags.parse("") == {}
    assert tags.parse("a:b  c:d e") == {"a": "b", "c": "d", "e": ""}
    assert tags.parse(r"a\ b:c\:d\\e".replace(r"\\e", "")) == {"a b": "c:d"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a:b:c", "more than one colon"),
        ("a:b a:c", "given twice"),
        (":b", "1 to 128"),
        ("a:" + "x" * 257, "at most 256"),
        (r"AWS\:x:y", "AWS's own"),
        ("external-storage/volume:x", "set by the provisioner"),
        ("a:b;c", "';' is not allowed"),
        (" ".join(f"k{n}:v" for n in range(45)), "at most 44"),
        ("a:b\\", "stands before nothing"),
    ],
)
def test_tags_that_aws_refuses_are_told(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        tags.parse(text)


# -- settings


def settings(**given: str) -> EfsSettings:
    return EfsSettings.from_texts({"provisioner_name": "example.com/efs", **given})


def test_the_environment_of_efs_provisioner_is_enough() -> None:
    environment = {info.env for info in EfsSettings.fields()}
    assert {"FILE_SYSTEM_ID", "AWS_REGION", "DNS_NAME", "PROVISIONER_NAME"} <= environment
    made = settings(file_system_id="fs-01234567", dns_name="10.0.0.5")
    found = made.read_file_systems().found(lambda _: "other")
    assert [(each.id, each.server) for each in found.values()] == [("fs-01234567", "10.0.0.5")]


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ({}, "--file-system-id: give either"),
        ({"file_system_id": "data"}, "--file-system-id: 'data' is no id"),
        ({"file_system_id": "fs-01234567,fs-01234568", "dns_name": "x"}, "--dns-name: is for one"),
        ({"file_system_id": "fs-01234567", "tags": "a:b:c"}, "--tags"),
        ({"file_system_id": "fs-01234567", "call_timeout": "120s"}, "--call-timeout"),
        ({"file_system_id": "fs-01234567", "archive_retention": "0"}, "--archive-retention"),
        ({"file_systems": "/nowhere.yaml"}, "--file-systems: /nowhere.yaml cannot be read"),
    ],
)
def test_bad_settings_name_the_flag(given_: dict[str, str], told: str) -> None:
    with pytest.raises(Problems, match=told):
        settings(**given_)


@pytest.mark.parametrize("how", ["provisioner_name", "additional_provisioner_names"])
def test_the_csi_drivers_name_is_refused(how: str) -> None:
    with pytest.raises(Problems, match=r"efs.csi.aws.com is the CSI driver's own name"):
        settings(**{"file_system_id": "fs-01234567", how: "efs.csi.aws.com"})


FILE = """
fileSystems:
  fs-0123456789abcdef0:
    dnsName: data.example.com
    mountPoint: /mnt/a
    path: /volumes
  fs-0123456789abcdef1:
"""


def test_a_file_says_more_of_each_file_system(tmp_path: Path) -> None:
    path = tmp_path / "file-systems.yaml"
    path.write_text(FILE)
    found = settings(file_systems=str(path)).read_file_systems().found(lambda id: f"{id}.aws")
    one, two = found.values()
    assert (one.server, one.mount_point, one.path) == (
        "data.example.com",
        Path("/mnt/a"),
        "/volumes",
    )
    assert one.expected().source == "data.example.com:/volumes"
    assert (two.server, two.mount_point) == ("fs-0123456789abcdef1.aws", None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fileSystems: [", "is not YAML"),
        ("servers: {}", "want one key"),
        ("fileSystems: {}", "at least one"),
        ("fileSystems: {data: {}}", "no id of a file system"),
        ("fileSystems: {fs-01234567: {mountpoint: /a}}", "unknown field `mountpoint`"),
        ("fileSystems: {fs-01234567: {path: 7}}", r"Expected `str`.*path"),
        ("fileSystems: {fs-01234567: {path: a}}", "not an absolute path"),
        ("fileSystems: {fs-01234567: {mountPoint: a/b}}", "not an absolute directory"),
        (
            "fileSystems: {fs-01234567: {mountPoint: /a}, fs-01234568: {mountPoint: /a/}}",
            "have the same mountPoint",
        ),
    ],
)
def test_a_bad_file_is_told_with_the_file_system(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "file-systems.yaml"
    path.write_text(text)
    problems = read(path)[1]
    assert problems
    assert re.search(told, "; ".join(problems)), problems
