"""The agent on a real control plane: from disks and mounts to volumes, and how those stay right."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from external_storage import PersistentVolume
from external_storage.kube.names import ANN_PROVISIONED_BY
from external_storage.kube.types import Node as PlainNode
from external_storage.testing import ControlPlane
from local_volume_provisioner import identity
from local_volume_provisioner.names import ANN_IDENTITY, LABEL_NODE, compatible_name
from local_volume_provisioner.node import Node

MIB = 1 << 20


def pv(name: str, node: Any, path: str, **meta: Any) -> dict[str, Any]:
    """A volume as the reference makes it."""
    hostname = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node.name]}
    return {
        "metadata": {"name": name, **meta},
        "spec": {
            "capacity": {"storage": "16Mi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Delete",
            "storageClassName": node.name,
            "local": {"path": path},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [hostname]}]}},
        },
    }


def test_volumes_are_the_references(node: Any) -> None:
    """Names, affinity, capacity, modes, labels, annotations, selector, owner and options."""
    node.class_(reclaimPolicy="Retain", mountOptions=["noatime"])
    term = {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}
    node.configure(
        top={
            "labelsForPV": {"team": "storage"},
            "nodeLabelsForPV": ["zone", "missing"],
            "setPVOwnerRef": True,
        },
        _={"selector": [term], "accessMode": "ReadWriteMany"},
    )
    node.tmpfs("with blank")
    node.agent.start()
    volume = node.volume("with blank")
    assert volume.name == compatible_name("with blank", node.name, node.name)
    assert volume.spec.capacity == {"storage": "16Mi"}
    assert volume.spec.access_modes == ("ReadWriteMany",)
    assert volume.spec.persistent_volume_reclaim_policy == "Retain"
    assert volume.spec.mount_options == ("noatime",)
    assert volume.metadata.labels == {"team": "storage", "zone": "a", LABEL_NODE: node.name}
    made_by = volume.metadata.annotations[ANN_PROVISIONED_BY]
    uid = node.api.get(PlainNode, node.name).uid
    assert made_by == f"local-volume-provisioner-{node.name}-{uid}"
    assert volume.metadata.owner_references[0].uid == uid
    affinity = volume.spec.node_affinity
    assert affinity is not None
    assert affinity.required is not None
    own, selected = affinity.required.node_selector_terms
    assert own.match_expressions[0].values == (node.name,)
    assert selected.match_expressions[0].key == "zone"
    found = identity.decode(volume.metadata.annotations[ANN_IDENTITY])
    assert found is not None
    assert (found.kind, found.fs_type) == ("mount", "tmpfs")


def test_a_block_volume_and_a_file_system_on_a_device(node: Any) -> None:
    node.class_("-raw", mountOptions=["noatime"])
    node.class_("-fs")
    node.configure(raw=node.block(namePattern="raw*"), fs={"namePattern": "fs*", "fsType": "xfs"})
    node.link("raw1", node.disks.disk("a"))
    node.link("fs1", node.disks.disk("b"))
    node.agent.start()
    raw, fs = node.volume("raw1"), node.volume("fs1")
    assert (raw.spec.volume_mode, raw.spec.mount_options) == ("Block", ())
    assert raw.spec.local.fs_type is None
    assert (fs.spec.volume_mode, fs.spec.local.fs_type) == ("Filesystem", "xfs")


def test_new_mounts_disks_and_classes_are_noticed_at_once(node: Any) -> None:
    """Each by what the kernel or the API server tells: the resync is an hour away."""
    node.configure(
        top={"minResyncPeriod": "1h"}, _={"namePattern": "m*"}, b=node.block(namePattern="d*")
    )
    node.class_()
    (node.entries / "m-over-child").mkdir()
    node.agent.start()
    # Over a directory that was there: no inotify event comes of that.
    node.tmpfs("m-over-child")
    node.volume("m-over-child")
    node.link("d1", node.disks.disk("a"))
    node.wait_state("d1", "Invalid")
    node.class_("-b")
    node.volume("d1")
    # A disk that appears behind a link that was there.
    target = node.disks.directory / "later"
    node.link("d2", str(target))
    node.wait_state("d2", "Invalid")
    target.symlink_to(node.disks.disk("b").path)
    node.volume("d2")


def test_a_mount_over_the_directory_itself_is_followed(node: Any) -> None:
    node.class_()
    node.configure(top={"minResyncPeriod": "1h"}, _={})
    node.agent.start()
    node.disks.mount(node.entries, "-t", "tmpfs", "none")
    node.tmpfs("in-the-new-one")
    node.volume("in-the-new-one")


def test_one_bad_entry_hides_nothing(node: Any) -> None:
    """L9, L10: a FIFO, stray files and a missing directory beside good disks."""
    node.class_()
    node.class_("-gone")
    node.configure(_={}, gone={"hostDir": "/no/such/dir", "mountDir": "/no/such/dir"})
    os.mkfifo(node.entries / "fifo")
    (node.entries / "file").write_text("x")
    (node.entries / "dangling").symlink_to("/dev/no-such-disk")
    os.mkfifo(os.fsencode(node.entries) + b"/caf\xe9")
    node.tmpfs("good")
    node.agent.start()
    node.volume("good")
    assert node.agent.get("/readyz")[0] == 200
    entries = node.agent.entries()
    assert entries["fifo"]["state"] == entries["file"]["state"] == "Ignored"
    assert entries["dangling"]["state"] == "Invalid"
    node.wait_event("Invalid")
    assert "not valid UTF-8" in entries["caf\\xe9"]["reason"]
    assert "caf\\xe9" in node.cli("list")
    node.wait_event("ClassProblem")
    assert "/no/such/dir" in node.agent.get("/healthz?verbose")[1]


def test_two_names_of_one_disk_are_one_volume(node: Any) -> None:
    """L12, and which of them it is does not change."""
    node.class_("-b")
    node.configure(b=node.block())
    disk = node.disks.disk("a")
    node.link("second", disk)
    node.agent.start()
    node.volume("second")
    node.link("first", disk)
    node.wait_state("first", "Duplicate")
    assert set(node.volumes()) == {"second"}
    assert "second" in node.agent.entries()["first"]["reason"]


def test_a_disk_in_use_is_not_offered_until_it_is_free(node: Any, tmp_path: Path) -> None:
    """L2."""
    node.class_("-b")
    node.configure(top={"minResyncPeriod": "1h"}, b=node.block())
    disk = node.disks.disk("a", 32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", disk.path], check=True)
    node.disks.mount(tmp_path / "m", disk.path)
    node.link("d", disk)
    node.agent.start()
    node.wait_state("d", "Busy")
    assert node.volumes() == {}
    subprocess.run(["umount", "--lazy", str(tmp_path / "m")], check=True)
    node.volume("d")


def test_a_free_volume_grows_with_its_disk(node: Any) -> None:
    node.class_("-b")
    node.configure(b=node.block())
    disk = node.disks.disk("a", 16 * MIB)
    node.link("d", disk)
    node.agent.start()
    node.volume("d")
    os.truncate(disk.image, 32 * MIB)
    subprocess.run(["losetup", "--set-capacity", disk.path], check=True)
    node.link("wake", "/dev/null")
    node.wait(
        lambda: node.volumes()["d"].spec.capacity["storage"] == "32Mi", "the volume has grown"
    )


def test_a_missing_disk_is_told_once_and_its_volume_stays(node: Any) -> None:
    node.class_()
    node.configure(_={})
    mounted = node.tmpfs("m")
    node.agent.start()
    node.bind("m")
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)
    node.wait_state("m", "Missing")
    event = node.wait_event("Missing")
    assert "nothing is mounted" in event.message
    node.link("wake", "/dev/null")
    node.wait_state("wake", "Ignored")
    assert [e.count for e in node.events("Missing")] == [1]
    assert node.volumes()["m"].status.phase == "Bound"


def test_gauges_stay_right(node: Any) -> None:
    """L10: the reference's capacity drops to 0 after one pass."""
    node.class_()
    node.configure(_={})
    node.tmpfs("m")
    node.agent.start()
    node.bind("m")
    node.link("wake", "/dev/null")
    node.wait_state("wake", "Ignored")
    prefix = "local_volume_provisioner_"
    metric = node.agent.metric
    assert metric(f'{prefix}persistentvolume_capacity_bytes{{mode="Filesystem"}}') == 16 * MIB
    assert metric(f'{prefix}persistentvolume_discovery_total{{mode="Filesystem"}}') == 1
    assert metric(f'{prefix}entries{{state="Bound"}}') == 1
    assert metric(f"{prefix}config_good") == 1


def test_volumes_of_the_reference_are_adopted(node: Any) -> None:
    """By path and provisioned-by, also from an earlier Node object: L5 of its users' complaints."""
    node.class_()
    node.configure(_={})
    node.tmpfs("m")
    node.tmpfs("other-nodes")
    name = compatible_name("m", node.name, node.name)
    by = f"local-volume-provisioner-{node.name}-{uuid.uuid4()}"
    path = str(node.entries / "m")
    made = node.api.create(
        PersistentVolume, pv(name, node, path, annotations={ANN_PROVISIONED_BY: by})
    )
    node.agent.start()
    node.wait(lambda: "m" in node.volumes(), "the volume has our label")
    adopted = node.volume("m")
    assert adopted.uid == made.uid
    node.wait(
        lambda: ANN_IDENTITY in node.volumes()["m"].metadata.annotations, "its identity is noted"
    )
    # Used and cleaned like one of ours.
    (node.entries / "m" / "file").write_text("x")
    node.use_and_release("m")
    node.volume("m", other_than=made.uid)
    assert not (node.entries / "m" / "file").exists()


def test_a_name_that_is_taken_keeps_no_disk_back(node: Any) -> None:
    node.class_()
    node.configure(_={})
    node.tmpfs("m")
    name = compatible_name("m", node.name, node.name)
    foreign = node.api.create(PersistentVolume, pv(name, node, "/some/where/else"))
    try:
        node.agent.start()
        assert node.volume("m").name.startswith("local-pv-m-")
    finally:
        node.delete_volume(foreign)


def test_a_bad_reload_changes_nothing_and_is_told(node: Any) -> None:
    """L8."""
    node.class_()
    node.configure(_={"namePattern": "m*"})
    node.tmpfs("m1")
    node.agent.start()
    node.volume("m1")
    node.configure(_={"namePattern": "[", "hostdri": "x"})
    event = node.wait_event("ConfigRefused")
    assert "hostdri" in event.message
    assert node.agent.metric("local_volume_provisioner_config_good") == 0
    node.tmpfs("m2")
    node.volume("m2")
    assert node.agent.running
    # Two edits in a row.
    node.configure(_={"namePattern": "n*"})
    node.configure(_={"namePattern": "m*, x*"})
    node.tmpfs("x1")
    node.volume("x1")
    assert node.agent.metric("local_volume_provisioner_config_good") == 1


def test_a_bad_configuration_at_the_start_is_refused_with_all_that_is_wrong(node: Any) -> None:
    node.configure(top={"colour": "red"}, _={"hostDir": "x", "volumeMode": "y"})
    said = node.cli("check-config", str(node.agent.config), check=False)
    assert said.count("error:") == 3
    refused = node.agent.refused()
    for word in ("colour", "hostDir", "volumeMode"):
        assert word in said
        assert word in refused


def test_a_full_state_directory_is_told(node: Any) -> None:
    """Nothing is offered that cannot be remembered; and that is no secret."""
    node.agent.state.mkdir()
    node.disks.mount(node.agent.state, "-t", "tmpfs", "-o", "size=1m", "none")
    node.class_()
    node.configure(_={})
    node.agent.start()
    filling = node.agent.state / "filling"
    with suppress(OSError):
        filling.write_bytes(bytes(2 * MIB))
    node.tmpfs("m")
    node.wait(lambda: node.agent.get("/readyz")[0] == 503, "it is not ready any more")
    assert "full" in node.wait_event("PassFailed").message
    assert node.volumes() == {}
    filling.unlink()
    node.volume("m")
    node.wait(lambda: node.agent.get("/readyz")[0] == 200, "it is ready again")


def test_steady_state_costs_no_request(node: Any) -> None:
    node.class_()
    node.configure(_={})
    for number in range(5):
        node.tmpfs(f"m{number}")
    node.agent.start()
    node.volume("m4")
    node.wait(lambda: len(node.volumes()) == 5, "all volumes")
    passes = "local_volume_provisioner_pass_duration_seconds_count"
    node.wait(
        lambda: node.agent.metric('local_volume_provisioner_entries{state="Available"}') == 5, "5"
    )
    before, writes = node.agent.metric(passes), written(node)
    for number in range(3):
        node.link(f"wake{number}", "/dev/null")
        node.wait_state(f"wake{number}", "Ignored")
    assert node.agent.metric(passes) > before
    assert written(node) == writes


def written(node: Any) -> list[tuple[str, str]]:
    return [
        (r.verb, r.resource) for r in node.proxy.requests if r.verb in ("create", "patch", "delete")
    ]


def test_only_volumes_of_this_node_are_watched(node: Any, control_plane: ControlPlane) -> None:
    """L11: every node's pod watches all volumes of the cluster."""
    node.class_()
    node.configure(_={})
    node.agent.start()

    def watches() -> list[str]:
        asked = (unquote(event["requestURI"]) for event in control_plane.audit_events())
        return [
            uri
            for uri in asked
            if "/persistentvolumes?" in uri and "watch=true" in uri and node.name in uri
        ]

    node.wait(watches, "a watch of volumes")
    assert all(f"labelSelector={LABEL_NODE}={node.name}" in uri for uri in watches())


def test_the_taint_is_removed_after_the_first_good_pass(node: Any) -> None:
    """L7: the reference's condition is inverted."""
    taint = {"key": "storage/agent-not-ready", "effect": "NoSchedule"}
    other = {"key": "keep/me", "effect": "NoSchedule"}
    node.api.patch(PlainNode, node.name, {"spec": {"taints": [other, taint]}})
    node.class_()
    top = {"removeNodeNotReadyTaint": True, "provisionerNotReadyNodeTaintKey": taint["key"]}
    node.configure(top=top, _={})
    node.agent.start()

    def keys() -> set[str]:
        return {taint.key for taint in node.api.get(Node, node.name).spec.taints}

    node.wait(lambda: taint["key"] not in keys(), "the taint is gone")
    assert "keep/me" in keys()


def test_list_and_explain(node: Any) -> None:
    node.class_("-b")
    node.configure(b=node.block(cleanMethod="signatures"))
    node.link("d", node.disks.disk("a"))
    node.agent.start()
    volume = node.volume("d")
    node.wait_state("d", "Available")
    table = node.cli("list")
    assert f"{node.entries}/d" in table
    assert "Available" in table
    listed = json.loads(node.cli("list", "-o", "json"))
    assert listed["entries"][0]["volume"] == volume.name
    explained = node.cli("explain", volume.name)
    assert "STAYS READABLE" in explained
    assert "likely: placement agrees" in explained
    assert "neither a path nor a volume" in node.cli("explain", "nothing", check=False)


def test_the_first_list_survives_an_outage(node: Any) -> None:
    node.class_()
    node.configure(_={})
    node.tmpfs("m")
    node.proxy.on("get", "nodes").fail(503)
    node.agent.start()
    node.volume("m")
