"""The node-agent's view of its node, on a directory in the place of sysfs; the rest is real, in
``guest/test_life``."""

from __future__ import annotations

from pathlib import Path

import pytest

from external_storage import Problems
from external_storage.kube.types import ClaimCondition, ClaimStatus, PersistentVolumeClaim
from iscsi_targetd_provisioner.node_agent import NodeAgentSettings, waits_for_node
from iscsi_targetd_provisioner.node_devices import Disk, NodeDevices, NodeError

IQN = "iqn.2026-01.com.example:storage:pvc-1"
FILE = Path("/etc/iscsi/initiatorname.iscsi")


@pytest.fixture
def node(tmp_path: Path) -> NodeDevices:
    """Two sessions, to two targets, of which ``IQN`` has LUN 0 as sdb."""
    sys = tmp_path / "sys"
    for number, (iqn, disk) in enumerate([("iqn.2026-01.com.example:other", "sda"), (IQN, "sdb")]):
        session = sys / f"class/iscsi_session/session{number}"
        scsi = session / f"device/target{number}:0:0/{number}:0:0:0"
        (scsi / "block" / disk).mkdir(parents=True)
        (session / "targetname").write_text(f"{iqn}\n")
        (scsi / "rescan").write_text("")
        block = sys / "class/block" / disk
        block.mkdir(parents=True)
        (block / "size").write_text("262144\n")
        (block / "dev").write_text(f"8:{16 * number}\n")
    root = tmp_path / "root"
    (root / "etc/iscsi").mkdir(parents=True)
    (root / "proc/1").mkdir(parents=True)
    (root / "proc/1/mountinfo").write_text("21 1 8:0 / / rw - ext4 /dev/sda rw\n")
    return NodeDevices(root=root, sys=sys)


def test_the_initiator_is_read_as_open_iscsi_does(node: NodeDevices) -> None:
    (node.root / "etc/iscsi/initiatorname.iscsi").write_text(
        "## a comment\n# InitiatorName=iqn.2000-01.a.b:no\nInitiatorName=iqn.2026-01.a.b:yes\n"
    )
    assert node.initiator(FILE) == "iqn.2026-01.a.b:yes"


def test_a_node_without_open_iscsi_is_told(node: NodeDevices) -> None:
    with pytest.raises(NodeError, match="is open-iscsi installed"):
        node.initiator(FILE)
    (node.root / "etc/iscsi/initiatorname.iscsi").write_text("GenerateName=yes\n")
    with pytest.raises(NodeError, match="has no line InitiatorName"):
        node.initiator(FILE)


def test_only_the_disks_of_the_target_and_lun_are_found(node: NodeDevices) -> None:
    assert [path.name for path in node.disks(IQN, 0)] == ["1:0:0:0"]
    assert node.disks(IQN, 1) == []
    assert node.disks("iqn.2026-01.com.example:none", 0) == []


def test_a_rescan_asks_the_kernel_and_tells_the_size(node: NodeDevices) -> None:
    [path] = node.disks(IQN, 0)
    assert node.rescan(path) == Disk("sdb", 128 << 20, "8:16")
    assert (path / "rescan").read_text() == "1"


def test_what_is_not_mounted_is_not_grown(node: NodeDevices) -> None:
    assert not node.grow(Disk("sdb", 128 << 20, "8:16"))


def test_a_file_system_that_cannot_grow_while_mounted_is_told(node: NodeDevices) -> None:
    (node.root / "proc/1/mountinfo").write_text("30 21 8:16 / /mnt rw - vfat /dev/sdb rw\n")
    with pytest.raises(NodeError, match="vfat on sdb cannot be grown"):
        node.grow(Disk("sdb", 128 << 20, "8:16"))


@pytest.mark.parametrize(
    ("condition", "state", "waits"),
    [
        ("FileSystemResizePending", "NodeResizePending", True),
        ("FileSystemResizePending", "NodeResizeInProgress", True),
        ("FileSystemResizePending", "", False),
        ("Resizing", "ControllerResizeInProgress", False),
    ],
)
def test_only_claims_whose_volume_has_grown_are_the_nodes(
    condition: str, state: str, waits: bool
) -> None:
    status = ClaimStatus(
        conditions=(ClaimCondition(type=condition, status="True"),),
        allocated_resource_statuses={"storage": state} if state else {},
    )
    assert waits_for_node(PersistentVolumeClaim(status=status)) is waits


def test_all_bad_settings_are_told_at_once() -> None:
    with pytest.raises(Problems) as caught:
        NodeAgentSettings.from_texts({"host_root": "host", "interval": "0.1s"})
    text = str(caught.value)
    assert all(flag in text for flag in ("--node-name", "--host-root", "--interval"))
