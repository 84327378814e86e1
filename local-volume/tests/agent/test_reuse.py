"""Volumes that come back into service, leave our sight or change their disks: what was known of
them before counts no more, and nobody's data is wiped or offered by it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from external_storage import PersistentVolume
from external_storage.kube.types import Node as PlainNode
from local_volume_provisioner import identity
from local_volume_provisioner.ledger import Ledger, Use
from local_volume_provisioner.names import ANN_IDENTITY, LABEL_NODE
from local_volume_provisioner.requests import Request, Requests, Wish

MIB = 1 << 20
SECRET = b"somebody's data " * 4096


def holds_the_secret(node: Any) -> bool:
    return bool(node.disk.read(0, len(SECRET)) == SECRET)


def without_label(node: Any, volume: PersistentVolume) -> None:
    patch = {"metadata": {"uid": volume.uid, "labels": {LABEL_NODE: None}}}
    node.api.patch(PersistentVolume, volume.name, patch)


def back_into_service(node: Any, volume: PersistentVolume) -> None:
    """As the documentation says: whoever wants the disk as it is clears the claim."""
    patch = {"metadata": {"uid": volume.uid}, "spec": {"claimRef": None}}
    node.api.patch(PersistentVolume, volume.name, patch)


def edited(node: Any, **fields: Any) -> None:
    """What is on record of ``d``, changed while nobody looks."""
    ledger = Ledger(node.agent.state)
    record = ledger.get(str(node.entries / "d"))
    assert record is not None
    ledger.write([msgspec.structs.replace(record, **fields)])
    ledger.close()


# -- out of sight


def test_a_bound_volume_without_our_label_is_not_taken_for_gone(block: Any) -> None:
    bound = block.bind("d")
    block.wait_state("d", "Bound")
    without_label(block, bound)
    block.wait(lambda: "d" in block.volumes(), "the volume has our label again")
    block.agent.kill()
    without_label(block, bound)
    block.agent.start()
    block.wait(lambda: "d" in block.volumes(), "the volume has our label again")
    block.wait_state("d", "Bound")
    assert block.volumes()["d"].uid == bound.uid
    assert holds_the_secret(block)


def test_a_volume_that_is_now_for_another_node_keeps_its_data(block: Any) -> None:
    """The node has another name since: nobody here can say who uses the volume."""
    bound = block.bind("d")
    block.wait_state("d", "Bound")
    block.agent.kill()
    labels = {"metadata": {"labels": {"kubernetes.io/hostname": "renamed"}}}
    block.api.patch(PlainNode, block.name, labels)
    without_label(block, bound)
    block.agent.start()
    assert bound.name in block.wait_state("d", "NeedsAttention")["reason"]
    block.wait_event("NeedsAttention")
    block.cli("clean", str(block.entries / "d"))
    block.cli("offer", str(block.entries / "d"))
    block.wait(lambda: not Requests(block.agent.state).all(), "both are looked at")
    block.wait_state("d", "NeedsAttention")
    assert holds_the_secret(block)
    block.delete_volume(bound)


def test_a_disk_of_another_cluster_waits_for_somebody(block: Any) -> None:
    bound = block.bind("d")
    block.wait_state("d", "Bound")
    block.agent.kill()
    block.delete_volume(bound)
    edited(block, cluster="another")
    block.agent.start()
    assert "another cluster" in block.wait_state("d", "NeedsApproval")["reason"]
    assert holds_the_secret(block)
    block.cli("clean", str(block.entries / "d"))
    block.volume("d")
    assert block.disk.is_blank()


def test_the_data_of_a_retained_volume_outlives_its_object(node: Any) -> None:
    """To delete the volume is the way to keep the disk, says the documentation of Retain."""
    node.class_("-b", reclaimPolicy="Retain")
    node.configure(b=node.block())
    node.disk = node.disks.disk("a", data=SECRET)
    node.link("d", node.disk)
    node.agent.start()
    bound = node.bind("d")
    node.wait_state("d", "Bound")
    node.release("d")
    node.wait_phase("d", "Released")
    node.delete_volume(bound)
    assert "Retain" in node.wait_state("d", "NeedsApproval")["reason"]
    node.wait_event("NeedsApproval")
    assert node.volumes() == {}
    assert holds_the_secret(node)
    node.cli("clean", "--wait", str(node.entries / "d"))
    node.volume("d")
    assert node.disk.is_blank()


# -- back into service


def test_a_half_wiped_volume_that_was_used_again_is_wiped_from_the_start(block: Any) -> None:
    old = block.bind("d")
    block.wait_state("d", "Bound")
    block.agent.kill()
    block.release("d")
    released = block.wait_phase("d", "Released")
    edited(
        block,
        use=Use.CLEANING,
        method="zero",
        bytes_done=8 * MIB,
        claim=released.spec.claim_ref.uid,
    )
    back_into_service(block, released)
    block.wait_phase("d", "Available")
    block.claim("d")
    block.wait_phase("d", "Bound")
    block.disk.write(SECRET)
    block.release("d")
    block.wait_phase("d", "Released")
    block.agent.start()
    block.volume("d", other_than=old.uid)
    assert block.disk.is_blank()


def test_a_wiped_volume_that_was_used_again_is_wiped_again(block: Any) -> None:
    """Its deletion had failed, and somebody has taken it before the next try; once it is released,
    once deleted by hand."""
    old = used_again(block)
    block.release("d")
    block.volume("d", other_than=old.uid)
    assert block.disk.is_blank()
    old = used_again(block)
    block.delete_volume(old)
    block.volume("d", other_than=old.uid)
    assert block.disk.is_blank()


def used_again(block: Any) -> PersistentVolume:
    rule = block.proxy.on("delete", "persistentvolumes", times=None).fail(500)
    old = block.use_and_release("d")
    block.wait(lambda: rule.applied >= 1, "a delete that fails")
    block.wait(block.disk.is_blank, "it is wiped")
    back_into_service(block, old)
    block.wait_phase("d", "Available")
    block.claim("d")
    bound: PersistentVolume = block.wait_phase("d", "Bound")
    block.wait_state("d", "Bound")
    block.disk.write(SECRET)
    block.proxy.clear()
    return bound


def test_nothing_is_offered_as_it_is_while_it_is_being_wiped(node: Any) -> None:
    begun, go = (node.disks.directory / name for name in ("begun", "go"))
    script = node.disks.directory / "clean.sh"
    script.write_text(
        f"#!/bin/sh\ntouch {begun}\nwhile ! test -e {go}; do sleep 0.1; done\n"
        'exec blkdiscard -z "$LOCAL_PV_BLKDEVICE"\n'
    )
    script.chmod(0o755)
    node.class_("-b")
    node.configure(b=node.block(blockCleanerCommand=[str(script)]))
    disk = node.disks.disk("a", data=SECRET)
    node.link("d", disk)
    node.agent.start()
    bound = node.bind("d")
    node.wait_state("d", "Bound")
    node.delete_volume(bound)
    node.wait(begun.exists, "the wipe has begun")
    node.cli("offer", str(node.entries / "d"))
    node.wait(lambda: not Requests(node.agent.state).all(), "the request is looked at")
    assert node.volumes() == {}
    go.touch()
    node.volume("d", other_than=bound.uid)
    assert disk.is_blank()


# -- other names, other disks


def test_a_disk_whose_volume_is_bound_is_not_offered_under_another_name(block: Any) -> None:
    bound = block.bind("d")
    block.wait_state("d", "Bound")
    other = block.disks.disk("b")
    block.link("d", other)
    block.link("e", block.disk)
    assert "whose volume is still there" in block.wait_state("e", "Duplicate")["reason"]
    block.wait_state("d", "IdentityMismatch")
    assert {volume.uid for volume in block.volumes().values()} == {bound.uid}


def test_what_is_known_of_a_dirty_disk_goes_with_it_to_another_name(block: Any) -> None:
    """A loop device has no ids of its own: in one boot its number tells."""
    block.configure(b=block.block(cleanPolicy="manual"))
    bound = block.bind("d")
    block.wait_state("d", "Bound")
    block.delete_volume(bound)
    block.wait_state("d", "NeedsApproval")
    (block.entries / "d").rename(block.entries / "e")
    block.wait_state("e", "NeedsApproval")
    assert "d" not in block.agent.entries()
    assert holds_the_secret(block)
    block.cli("clean", str(block.entries / "e"))
    block.volume("e")
    assert block.disk.is_blank()


def test_a_new_disk_taken_as_it_is_lets_nobody_forget_the_old_one(block: Any) -> None:
    block.configure(b=block.block(cleanPolicy="manual"))
    bound = block.bind("d")
    block.wait_state("d", "Bound")
    block.delete_volume(bound)
    block.wait_state("d", "NeedsApproval")
    block.link("d", block.disks.disk("b"))
    block.wait_state("d", "IdentityMismatch")
    block.cli("offer", str(block.entries / "d"))
    block.volume("d")
    block.link("e", block.disk)
    block.wait_state("e", "NeedsApproval")
    assert set(block.volumes()) == {"d"}
    assert holds_the_secret(block)


def test_a_file_system_whose_volume_is_bound_is_not_offered_elsewhere(node: Any) -> None:
    node.class_()
    node.configure(_={})
    mounted = node.file_system("m")
    node.agent.start()
    node.bind("m")
    node.wait_state("m", "Bound")
    device = subprocess.check_output(["findmnt", "-no", "SOURCE", str(mounted)], text=True).strip()
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)
    node.disks.mount(node.entries / "n", device)
    node.wait_state("n", "Duplicate")
    node.wait_state("m", "Missing")
    assert set(node.volumes()) == {"m"}


def test_a_free_volume_of_a_disk_that_has_gone_is_taken_back(block: Any) -> None:
    """Nobody shall be given it; and as nobody has had it, it is offered when it comes back."""
    old = block.volume("d")
    block.wait_state("d", "Available")
    (block.entries / "d").unlink()
    block.wait(lambda: block.volumes() == {}, "the volume is withdrawn")
    block.wait_event("Missing")
    block.agent.kill()
    block.agent.start()
    block.link("d", block.disk)
    block.volume("d", other_than=old.uid)
    # Another one in its place.
    block.wait_state("d", "Available")
    new = block.volume("d")
    block.link("d", block.disks.disk("b"))
    block.volume("d", other_than=new.uid)
    assert holds_the_secret(block)


def test_a_disk_mounted_where_we_do_not_see_it_is_not_offered(node: Any, tmp_path: Path) -> None:
    """As the host's own mounts are, for an agent in a container."""
    node.class_("-b")
    node.configure(b=node.block())
    disk = node.disks.disk("a", 32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", disk.path], check=True)
    (tmp_path / "m").mkdir()
    script = f"mount --make-rprivate / && mount {disk.path} {tmp_path}/m && echo ready && read x"
    command = ["unshare", "--mount", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        node.link("d", disk)
        node.agent.start()
        assert "in use" in node.wait_state("d", "Busy")["reason"]
        assert node.volumes() == {}
        holder.communicate(b"\n")
    node.link("wake", "/dev/null")
    node.volume("d")


def test_an_approval_is_for_the_disk_and_the_user_it_was_given_for(node: Any) -> None:
    node.class_("-b")
    node.configure(b=node.block(cleanPolicy="manual", blockCleanerCommand=["false"]))
    node.disk = node.disks.disk("a", data=SECRET)
    node.link("d", node.disk)
    node.agent.start()
    released = node.use_and_release("d")
    shown = node.wait_state("d", "NeedsApproval")
    requests, path = Requests(node.agent.state), str(node.entries / "d")
    for stale in (
        Request(Wish.CLEAN, path, uid="of the last one", disk=shown["disk"]),
        Request(Wish.CLEAN, path, uid=released.uid, disk="another"),
    ):
        requests.add(stale)
        node.wait(lambda: not requests.all(), "the approval is dropped")
        assert node.wait_state("d", "NeedsApproval")
    # And it is for one try.
    node.cli("clean", "--wait", str(node.entries / "d"))
    node.wait_event("CleaningFailed")
    node.wait_state("d", "NeedsApproval")
    assert requests.all() == []
    assert holds_the_secret(node)


def test_a_disk_in_a_new_boot_is_known_by_its_ids_of_this_one(block: Any) -> None:
    """Else one without hardware ids would be known by its size alone for ever."""
    volume = block.bind("d")
    block.wait_state("d", "Bound")
    block.agent.kill()
    known = identity.decode(volume.metadata.annotations[ANN_IDENTITY])
    assert known is not None
    edited(block, identity=msgspec.structs.replace(known, boot_id="an earlier one", device="7:99"))
    block.agent.start()
    block.wait_state("d", "Bound")
    block.agent.stop()
    ledger = Ledger(block.agent.state)
    (record,) = ledger.all()
    ledger.close()
    assert record.identity == known
    assert json.loads(volume.metadata.annotations[ANN_IDENTITY])["bootId"] == identity.boot_id()
