"""The configuration: the reference's keys, and everything that is wrong at once."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from external_storage import Problems
from local_volume_provisioner.cli import cli
from local_volume_provisioner.config import (
    CleanPolicy,
    Config,
    RequiredIdentity,
    VolumeMode,
    parse,
)
from local_volume_provisioner.globs import Globs
from local_volume_provisioner.methods import Method, MethodKind

# As the reference's chart renders it.
REFERENCE = {
    "storageClassMap": """\
fast-disks:
  hostDir: /mnt/fast-disks
  mountDir: /mnt/fast-disks
  blockCleanerCommand:
    - "/scripts/shred.sh"
    - "2"
  volumeMode: Filesystem
  fsType: ext4
  namePattern: "*"
raw:
  hostDir: /mnt/raw
  mountDir: /raw
  volumeMode: Block
  accessMode: ReadWriteOncePod
  selector:
    - matchExpressions:
        - {key: zone, operator: In, values: [a]}
""",
    "nodeLabelsForPV": "- kubernetes.io/hostname\n- zone\n",
    "labelsForPV": "team: storage\n",
    "useJobForCleaning": "yes",
    "jobTolerations": "- operator: Exists\n",
    "minResyncPeriod": "5m0s",
    "useNodeNameOnly": "true",
    "setPVOwnerRef": "true",
    "removeNodeNotReadyTaint": "true",
    "provisionerNotReadyNodeTaintKey": "sig-storage-local-static-provisioner/agent-not-ready",
}


def problems(texts: dict[str, str]) -> list[str]:
    with pytest.raises(Problems) as caught:
        parse(texts)
    return caught.value.problems


def a_class(**fields: object) -> dict[str, str]:
    return {"storageClassMap": yaml.dump({"c": {"hostDir": "/d", "mountDir": "/d", **fields}})}


def test_a_configuration_of_the_reference_works() -> None:
    found = parse(REFERENCE)
    fast, raw = found.classes["fast-disks"], found.classes["raw"]
    assert (fast.mode, fast.fs_type, fast.method) == (
        VolumeMode.FILESYSTEM,
        "ext4",
        Method(MethodKind.OVERWRITE, 3),
    )
    assert (raw.mode, raw.mount_dir, raw.access_mode) == (
        VolumeMode.BLOCK,
        "/raw",
        "ReadWriteOncePod",
    )
    assert raw.selector[0]["matchExpressions"][0]["key"] == "zone"
    assert found.node_labels == ("kubernetes.io/hostname", "zone")
    assert found.labels == {"team": "storage"}
    assert (found.use_job_for_cleaning, found.resync_s) == (True, 300.0)
    assert (found.use_node_name_only, found.set_owner_reference, found.remove_taint) == (True,) * 3


def test_keys_may_be_in_any_letter_case() -> None:
    found = parse({"STORAGECLASSMAP": "c: {hostdir: /d, MountDir: /d, VOLUMEMODE: Block}"})
    assert found.classes["c"].mode is VolumeMode.BLOCK


def test_nothing_configured_is_no_error() -> None:
    assert parse({}) == Config()


def test_the_default_leaves_no_data_readable() -> None:
    """L3: the reference's default removes signatures only."""
    method = parse(a_class()).classes["c"].method
    assert method.kind is MethodKind.ZERO
    assert "unreadable" in method.leaves


@pytest.mark.parametrize(
    ("command", "method"),
    [
        (["/scripts/quick_reset.sh"], "signatures"),
        (["/scripts/blkdiscard.sh"], "discard"),
        (["/scripts/dd_zero.sh", "2"], "overwrite:2"),
        (["/scripts/shred.sh"], "overwrite:4"),
        (["/opt/mine.sh", "-x"], "command /opt/mine.sh -x"),
    ],
)
def test_the_references_scripts_are_built_in(command: list[str], method: str) -> None:
    assert str(parse(a_class(blockCleanerCommand=command)).classes["c"].method) == method


def test_every_method_says_whether_data_stays_readable() -> None:
    for kind in MethodKind:
        leaves = Method(kind).leaves
        assert re.search("unreadable|READABLE|command's affair", leaves), kind


def test_new_keys() -> None:
    fields = {"cleanMethod": "overwrite:3", "cleanPolicy": "manual", "identity": "placement"}
    found = parse(a_class(**fields)).classes["c"]
    assert found.method == Method(MethodKind.OVERWRITE, 3)
    assert (found.clean_policy, found.required_identity) == (
        CleanPolicy.MANUAL,
        RequiredIdentity.PLACEMENT,
    )


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"storageClassMpa": "{}"}, "storageClassMpa: is not a key; there are: jobTolerations"),
        (a_class(hostdri="/x"), "storageClassMap.c.hostdri: is not a key"),
        (a_class(hostDir=""), "storageClassMap.c.hostDir: must be given"),
        (a_class(hostDir="mnt/x"), "is not an absolute path"),
        (a_class(hostDir="/mnt/../etc"), "is not an absolute path without '..'"),
        (a_class(mountDir="//"), "the root directory"),
        (a_class(namePattern="[a"), "has a [ without its ]"),
        (a_class(volumeMode="Raw"), "'Raw' is not one of: Filesystem, Block"),
        (a_class(accessMode="RWO"), "accessMode: 'RWO' is not one of"),
        (a_class(blockCleanerCommand=[]), "blockCleanerCommand: is an empty list"),
        (a_class(cleanMethod="shred"), "'shred' is not one of: zero, discard"),
        (a_class(cleanMethod="overwrite:0"), "not a number of passes from 1"),
        (a_class(cleanMethod="command"), "'command' needs blockCleanerCommand"),
        (a_class(cleanMethod="reformat", fsType="ntfs"), "'reformat' makes ext4, xfs"),
        (a_class(cleanPolicy="later"), "cleanPolicy: 'later' is not one of: auto"),
        (a_class(selector={"a": "b"}), "selector: want a list"),
        (a_class(selector=[{"matchExpressions": [{"key": "a"}]}]), "selector[0]: want key"),
        ({"storageClassMap": "c: {hostDir: /d}\nc: {}"}, "line 2: the key 'c' is twice"),
        ({"storageClassMap": "c: ["}, "storageClassMap: line 1"),
        ({"storageClassMap": "- c"}, "want a mapping, got a list"),
        ({"useAlphaAPI": "true"}, "Kubernetes has had no such API"),
        ({"minResyncPeriod": "5 minutes"}, "minResyncPeriod: '5 minutes' is not a duration"),
        ({"minResyncPeriod": "0"}, "must be at least 1s"),
        ({"setPVOwnerRef": "perhaps"}, "neither true nor false"),
        ({"labelsForPV": "a b: c"}, "is not a label"),
        ({"removeNodeNotReadyTaint": "true"}, "provisionerNotReadyNodeTaintKey: must be given"),
    ],
)
def test_what_is_wrong_is_named(texts: dict[str, str], said: str) -> None:
    found = problems(texts)
    assert len(found) == 1
    assert said in found[0]


def test_all_that_is_wrong_is_told_at_once() -> None:
    texts = {**a_class(volumeMode="Raw", cleanMethod="no", extra=1), "useNodeNameOnly": "x"}
    assert len(problems(texts)) == 4


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"hostDir": "/a"}, {"hostDir": "/a/b"}, "lie in one another"),
        ({"hostDir": "/a"}, {"hostDir": "/a"}, "namePattern too"),
        ({"hostDir": "/a", "mountDir": "/m"}, {"hostDir": "/b", "mountDir": "/m"}, "two need two"),
        ({"hostDir": "/a"}, {"hostDir": "/ab"}, ""),
        ({"hostDir": "/a", "namePattern": "x*"}, {"hostDir": "/a", "namePattern": "y*"}, ""),
    ],
)
def test_overlapping_directories_are_named(
    one: dict[str, str], other: dict[str, str], said: str
) -> None:
    classes = {
        name: {"mountDir": fields["hostDir"], **fields}
        for name, fields in {"one": one, "other": other}.items()
    }
    texts = {"storageClassMap": yaml.dump(classes)}
    if not said:
        parse(texts)
        return
    (problem,) = problems(texts)
    assert said in problem
    assert "storageClassMap.one and .other" in problem


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("*", ["a", ".hidden", "a b"], []),
        ("sd?, nvme*", ["sda", "nvme0n1"], ["sdaa", " nvme0", "vda"]),
        ("[a-c]x", ["ax", "cx"], ["dx", "-x"]),
        ("[^a]x", ["bx"], ["ax"]),
        (r"\*", ["*"], ["a"]),
        ("a.b", ["a.b"], ["axb"]),
    ],
)
def test_globs_are_those_of_go(pattern: str, matching: list[str], other: list[str]) -> None:
    globs = Globs.parse(pattern)
    assert all(globs.match(name) for name in matching)
    assert not any(globs.match(name) for name in other)


@given(st.text(max_size=40), st.text(max_size=10))
def test_any_pattern_is_understood_or_refused(pattern: str, name: str) -> None:
    try:
        globs = Globs.parse(pattern)
    except ValueError:
        return
    assert globs.match(name) in (True, False)


@given(st.dictionaries(st.sampled_from([*REFERENCE, "x"]), st.text(max_size=60), max_size=4))
def test_any_text_is_understood_or_refused(texts: dict[str, str]) -> None:
    with contextlib.suppress(Problems):
        parse(texts)


def test_check_config_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "storageClassMap").write_text("c: {hostDir: /d}")
    (tmp_path / "..data").mkdir()
    result = CliRunner().invoke(cli, ["check-config", str(tmp_path)])
    assert result.exit_code == 2
    assert "storageClassMap.c.mountDir: must be given" in result.output
    (tmp_path / "storageClassMap").write_text("c: {hostDir: /d, mountDir: /d}")
    result = CliRunner().invoke(cli, ["check-config", str(tmp_path)])
    assert result.exit_code == 0
    assert "old data is unreadable" in result.output
