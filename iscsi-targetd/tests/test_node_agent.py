"""The node-agent, with a directory in the place of the node's sysfs; on a real node it runs in
``e2e``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from external_storage import AgentContext, Change, PersistentVolume, Problems
from external_storage.kube.types import (
    ClaimCondition,
    ClaimStatus,
    Node,
    ObjectMeta,
    PersistentVolumeClaim,
)
from external_storage.testing.builders import Clock
from iscsi_targetd_provisioner import node_agent
from iscsi_targetd_provisioner.fleet import ANN_SERVER
from iscsi_targetd_provisioner.node_agent import NodeAgent, NodeAgentSettings, waits_for_node
from iscsi_targetd_provisioner.node_devices import Disk, NodeDevices, NodeError

IQN = "iqn.2026-01.com.example:storage:pvc-1"
FILE = Path("/etc/iscsi/initiatorname.iscsi")
ABSTRACT = "\0/org/kernel/linux/storage/multipathd-of-a-test"


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


def test_multipathd_is_asked_in_the_name_spaces_of_the_node(
    node: NodeDevices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It listens on an abstract socket, which another network does not have."""
    listener = tmp_path / "listener.py"
    listener.write_text(
        "import socket, sys\n"
        "with socket.socket(socket.AF_UNIX) as end:\n"
        f"    end.bind({ABSTRACT!r})\n"
        "    end.listen()\n"
        "    print('listens', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    argv = ["unshare", "--net", "--mount", sys.executable, str(listener)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"listens\n":
            pytest.skip("needs root, to have another network")
        (node.root / "proc/1/ns").symlink_to(f"/proc/{process.pid}/ns")
        program = tmp_path / "bin" / "multipathd"
        program.parent.mkdir()
        program.write_text(
            f"#!{sys.executable}\n"
            "import pathlib, socket, sys\n"
            "with socket.socket(socket.AF_UNIX) as end:\n"
            f"    end.connect({ABSTRACT!r})\n"
            f"pathlib.Path({str(node.sys / 'class/block/dm-0/size')!r}).write_text('524288\\n')\n"
            f"pathlib.Path({str(tmp_path / 'asked')!r}).write_text(' '.join(sys.argv[1:]))\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        make_map(node, size=262144)
        assert node.multipath_of(Disk("sdb", 256 << 20, "8:16")) == Disk("dm-0", 256 << 20, "253:0")
        assert (tmp_path / "asked").read_text() == "resize map mpatha"
    finally:
        process.communicate()


def make_map(node: NodeDevices, *, size: int) -> None:
    """A map over sdb, of that many sectors."""
    dm = node.sys / "class/block/dm-0"
    (dm / "dm").mkdir(parents=True)
    (dm / "dm/uuid").write_text("mpath-36001405\n")
    (dm / "dm/name").write_text("mpatha\n")
    (dm / "size").write_text(f"{size}\n")
    (dm / "dev").write_text("253:0\n")
    holders = node.sys / "class/block/sdb/holders"
    holders.mkdir()
    (holders / "dm-0").symlink_to(dm)


# -- the agent


class Api:
    """The API server as far as the agent asks it."""

    def __init__(self, volume: PersistentVolume) -> None:
        self.volume = volume
        self.node = Node(metadata=ObjectMeta(name="node-1", uid="1"))
        self.reads = 0
        self.patched: list[str] = []

    def find(self, _kind: type, _name: str) -> PersistentVolume:
        return self.volume

    def get(self, _kind: type, _name: str) -> Node:
        self.reads += 1
        return self.node

    def patch(self, kind: type, name: str, _patch: object, **_more: object) -> None:
        self.patched.append(f"{kind.__name__}/{name}")


class Events(list[str]):
    def normal(self, _about: object, reason: str, _text: str) -> None:
        self.append(reason)

    warning = normal


@pytest.fixture
def agent(node: NodeDevices, monkeypatch: pytest.MonkeyPatch) -> NodeAgent:
    """On a node that has the disk, of a claim that waits, of a volume of 128 MiB."""
    body = {
        "metadata": {"name": "pvc-1", "annotations": {ANN_SERVER: "storage"}},
        "spec": {
            "capacity": {"storage": "128Mi"},
            "accessModes": ["ReadWriteOnce"],
            "claimRef": {"name": "data", "namespace": "default", "uid": "1"},
            "iscsi": {"targetPortal": "10.0.0.5:3260", "iqn": IQN, "lun": 0},
        },
    }
    api = Api(msgspec.convert(body, PersistentVolume))
    context = SimpleNamespace(client=api, events=Events())
    settings = NodeAgentSettings.from_texts({"node_name": "node-1", "host_root": str(node.root)})
    (node.root / "etc/iscsi/initiatorname.iscsi").write_text("InitiatorName=iqn.2026-01.a.b:c\n")
    made = NodeAgent(settings, cast(AgentContext, context))
    made._devices = node
    monkeypatch.setattr(NodeDevices, "_run", lambda *_args, **_more: None)
    change(made, None, CLAIM)
    return made


CLAIM = msgspec.convert(
    {
        "metadata": {"name": "data", "namespace": "default", "uid": "1", "resourceVersion": "7"},
        "spec": {"volumeName": "pvc-1"},
        "status": {
            "conditions": [{"type": "FileSystemResizePending", "status": "True"}],
            "allocatedResourceStatuses": {"storage": "NodeResizePending"},
        },
    },
    PersistentVolumeClaim,
)


def change(
    agent: NodeAgent, old: PersistentVolumeClaim | None, new: PersistentVolumeClaim | None
) -> None:
    """As the watch would tell it."""
    agent._claims._store.replace([] if new is None else [new])
    agent._changed(Change(old, new))


def api_of(agent: NodeAgent) -> Api:
    return cast(Api, agent.context.client)


def mounted(node: NodeDevices, options: str) -> None:
    text = f"30 21 8:16 / /mnt {options} - ext4 /dev/sdb {options}\n"
    (node.root / "proc/1/mountinfo").write_text(text)


def finished(agent: NodeAgent) -> bool:
    agent.look()
    return "PersistentVolumeClaim/data" in api_of(agent).patched


def test_an_expansion_is_ended_when_the_file_system_has_grown(
    agent: NodeAgent, node: NodeDevices
) -> None:
    assert not finished(agent), "nothing has it mounted"
    mounted(node, "rw")
    assert finished(agent)


def test_a_map_that_has_not_grown_ends_nothing(agent: NodeAgent, node: NodeDevices) -> None:
    mounted(node, "rw")
    make_map(node, size=131072)
    assert not finished(agent)
    assert agent._trouble is not None
    assert "dm-0 has 64Mi after a rescan" in agent._trouble


def test_what_no_node_may_write_to_is_ended_with_the_disk(
    agent: NodeAgent, node: NodeDevices
) -> None:
    mounted(node, "ro")
    assert not finished(agent), "another pod may yet mount it to write"
    api = api_of(agent)
    spec = msgspec.structs.replace(api.volume.spec, access_modes=("ReadOnlyMany",))
    api.volume = msgspec.structs.replace(api.volume, spec=spec)
    assert finished(agent)


def test_what_another_node_has_ended_is_rescanned_here_too(
    agent: NodeAgent, node: NodeDevices
) -> None:
    [path] = node.disks(IQN, 0)
    change(agent, CLAIM, None)
    agent.look()
    assert (path / "rescan").read_text() == "1"
    assert not finished(agent)
    (path / "rescan").write_text("")
    agent.look()
    assert (path / "rescan").read_text() == "", "once is enough"


def test_the_node_is_asked_for_rarely_when_it_says_its_initiator(
    agent: NodeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(agent, "_clock", clock)
    api = api_of(agent)
    for _ in range(5):
        agent.look()
    assert (api.reads, api.patched) == (1, ["Node/node-1"])
    clock.advance(61)
    agent.look()
    assert api.reads == 2


def test_a_node_without_open_iscsi_is_told_of_once(
    agent: NodeAgent, node: NodeDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    (node.root / "etc/iscsi/initiatorname.iscsi").unlink()
    told: list[str] = []
    log = SimpleNamespace(warning=lambda text, **_fields: told.append(text))
    monkeypatch.setattr(node_agent, "log", log)
    rounds = iter(range(5))

    def wait(_seconds: float) -> None:
        agent._stopping = next(rounds) == 4

    monkeypatch.setattr(agent._wake, "wait", wait)
    agent._run()
    assert told == ["the node cannot be looked after"]


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
