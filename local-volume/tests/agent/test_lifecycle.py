"""The agent on a real control plane: released volumes are cleaned, once, and only those."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from external_storage import PersistentVolume
from external_storage.kube.types import Node as PlainNode
from local_volume_provisioner.cleaning import blocks
from local_volume_provisioner.methods import MethodKind

MIB = 1 << 20
SECRET = b"somebody's data " * 4096
PREFIX = "local_volume_provisioner_"


def cleanings(node: Any) -> int:
    return int(node.agent.metric(f"{PREFIX}proctable_succeeded"))


def test_a_released_volume_is_cleaned_and_offered_again(block: Any) -> None:
    old = block.use_and_release("d")
    new = block.volume("d", other_than=old.uid)
    assert new.name == old.name
    assert block.disk.is_blank()
    assert cleanings(block) == 1
    deleted = f'{PREFIX}persistentvolume_delete_total{{mode="Block",type="process"'
    # Counted when the API server has answered: the watch may have shown it before that.
    block.wait(lambda: block.agent.metric(deleted) == 1, "the deletion is counted")
    assert "old data is unreadable" in block.wait_event("CleaningStarted").message
    block.wait_event("Cleaned")


def test_a_user_may_partition_and_format_a_raw_volume(block: Any) -> None:
    """What is on it is theirs: it says nothing about which disk it is."""
    old = block.bind("d")
    table = "label: gpt\nstart=1MiB, size=12MiB\n"
    subprocess.run(
        ["sfdisk", "-q", "--no-reread", block.disk.path], input=table, text=True, check=True
    )
    subprocess.run(["partx", "--update", block.disk.path], check=True)
    subprocess.run(["mkfs.ext4", "-q", f"{block.disk.path}p1"], check=True)
    block.release("d")
    block.volume("d", other_than=old.uid)
    assert block.disk.is_blank()


def test_a_retained_volume_is_kept(node: Any) -> None:
    node.class_("-b", reclaimPolicy="Retain")
    node.configure(b=node.block())
    disk = node.disks.disk("a", data=SECRET)
    node.link("d", disk)
    node.agent.start()
    node.use_and_release("d")
    node.wait_state("d", "Released")
    assert disk.read(0, len(SECRET)) == SECRET


def test_a_volume_deleted_by_hand_is_cleaned_before_it_is_offered_again(block: Any) -> None:
    """L13, the agent watching."""
    bound = block.bind("d")
    block.delete_volume(bound)
    block.volume("d", other_than=bound.uid)
    assert block.disk.is_blank()


def test_a_claim_that_came_and_went_between_two_passes_is_known(block: Any) -> None:
    """L13, the agent seeing the use and the deletion at once."""
    block.wait_state("d", "Available")
    os.kill(block.agent.pid, signal.SIGSTOP)
    try:
        bound = block.bind("d")
        block.delete_volume(bound)
    finally:
        os.kill(block.agent.pid, signal.SIGCONT)
    block.volume("d", other_than=bound.uid)
    assert block.disk.is_blank()


def test_a_volume_deleted_while_nobody_looked_is_cleaned_too(block: Any) -> None:
    """L13, the agent down, and its name is another one when it comes back."""
    bound = block.bind("d")
    block.wait_state("d", "Bound")
    block.agent.kill()
    block.delete_volume(bound)
    block.agent.start()
    block.volume("d", other_than=bound.uid)
    assert block.disk.is_blank()


def test_a_volume_that_may_have_been_used_is_neither_wiped_nor_offered(block: Any) -> None:
    block.wait_state("d", "Available")
    volume = block.volume("d")
    block.agent.kill()
    block.delete_volume(volume)
    block.agent.start()
    block.wait_state("d", "NeedsAttention")
    assert block.disk.read(0, len(SECRET)) == SECRET
    assert block.volumes() == {}
    block.wait_event("NeedsAttention")
    block.cli("offer", str(block.entries / "d"))
    block.volume("d")
    assert block.disk.read(0, len(SECRET)) == SECRET


def test_an_empty_directory_that_may_have_been_used_is_offered(node: Any) -> None:
    node.class_()
    node.configure(_={})
    node.file_system("m")
    node.agent.start()
    node.wait_state("m", "Available")
    volume = node.volume("m")
    node.agent.kill()
    node.delete_volume(volume)
    node.agent.start()
    node.volume("m", other_than=volume.uid)


def test_a_failing_delete_wipes_nothing_twice(block: Any) -> None:
    """L5: the reference forgets the wipe before the API delete, and wipes the whole disk again."""
    rule = block.proxy.on("delete", "persistentvolumes", times=1).fail(500)
    old = block.use_and_release("d")
    block.wait(lambda: rule.applied >= 1, "a delete that fails")
    wiped = block.agent.metric(f"{PREFIX}proctable_succeeded")
    block.volume("d", other_than=old.uid)
    assert rule.applied == 1
    assert cleanings(block) == wiped == 1


def test_a_cleaned_volume_is_not_wiped_again_after_a_restart(block: Any) -> None:
    """L5: success is on record before the API delete."""
    rule = block.proxy.on("delete", "persistentvolumes", times=None).fail(500)
    old = block.use_and_release("d")
    block.wait(lambda: rule.applied >= 1, "a delete that fails")
    block.agent.kill()
    block.proxy.clear()
    block.disk.write(b"a mark: would be gone after another wipe")
    block.agent.start()
    block.volume("d", other_than=old.uid)
    assert block.disk.read(0, 6) == b"a mark"
    assert cleanings(block) == 0


def test_another_volume_of_the_same_name_is_not_deleted(block: Any) -> None:
    """L5: the reference deletes by name alone, and its names repeat. Here the delete is on its way
    while the volume is made anew: by whoever restores a backup, Bound to a claim of its own."""
    rule = block.proxy.on("delete", "persistentvolumes", times=1).delay(5.0)
    old = block.use_and_release("d")
    block.wait(lambda: rule.applied >= 1, "the volume is to be deleted")
    block.delete_volume(old)
    body = msgspec.to_builtins(old)
    meta = {"name": old.name, "labels": dict(old.metadata.labels)}
    meta["annotations"] = dict(old.metadata.annotations)
    spec = {key: value for key, value in body["spec"].items() if key != "claimRef"}
    new = block.api.create(PersistentVolume, {"metadata": meta, "spec": spec})
    block.claim("d")
    assert block.wait_phase("d", "Bound").uid == new.uid
    # The old one is gone, which is all that the agent wanted.
    deleted = f"{PREFIX}persistentvolume_delete_total"
    block.wait(lambda: block.agent.metric(deleted) == 1, "the delete is answered")
    assert block.volumes()["d"].uid == new.uid


def test_a_failing_cleaner_is_told_and_backs_off(node: Any) -> None:
    """L4: no event, no metric, and started again at once for ever."""
    node.class_("-b")
    count = node.disks.directory / "count"
    script = node.disks.directory / "clean.sh"
    script.write_text(f'#!/bin/sh\necho x >> {count}\necho "no such luck"; exit 1\n')
    script.chmod(0o755)
    node.configure(b=node.block(blockCleanerCommand=[str(script)]))
    node.link("d", node.disks.disk("a", data=SECRET))
    node.agent.start()
    node.use_and_release("d")
    assert "no such luck" in node.wait_event("CleaningFailed").message
    node.wait(
        lambda: node.agent.metric(f"{PREFIX}persistentvolume_delete_failed_total") == 1, "metric"
    )
    for number in range(3):
        node.link(f"wake{number}", "/dev/null")
        node.wait_state(f"wake{number}", "Ignored")
    # Passes do not cut the back-off short.
    assert count.read_text() == "x\n"
    # A person does.
    script.write_text('#!/bin/sh\nexec blkdiscard -z "$LOCAL_PV_BLKDEVICE"\n')
    node.cli("clean", str(node.entries / "d"))
    uid = node.volumes()["d"].uid
    node.volume("d", other_than=uid)


def test_the_disk_behind_a_path_replaced_by_another_is_not_touched(block: Any) -> None:
    """Same size, same path: refused, told, not a byte written; and so for whoever approves it."""
    block.bind("d")
    block.wait_state("d", "Bound")
    other = block.disks.disk("other", data=SECRET)
    before = hashlib.sha256(other.read()).digest()
    block.link("d", other)
    block.wait_state("d", "IdentityMismatch")
    block.release("d")
    block.wait_phase("d", "Released")
    block.wait_event("IdentityMismatch")
    block.cli("clean", str(block.entries / "d"))
    block.link("wake", "/dev/null")
    block.wait_state("wake", "Ignored")
    block.wait_state("d", "IdentityMismatch")
    assert hashlib.sha256(other.read()).digest() == before
    assert block.disk.read(0, len(SECRET)) == SECRET
    # The right one again: it is cleaned.
    old = block.volumes()["d"]
    block.link("d", block.disk)
    block.volume("d", other_than=old.uid)
    assert block.disk.is_blank()
    assert hashlib.sha256(other.read()).digest() == before


def test_an_unmounted_file_system_is_not_clean(node: Any) -> None:
    """L1."""
    node.class_()
    node.configure(_={})
    mounted = node.file_system("m")
    device = subprocess.run(
        ["findmnt", "-no", "SOURCE", str(mounted)], capture_output=True, text=True, check=True
    ).stdout.strip()
    node.agent.start()
    old = node.bind("m")
    (mounted / "file").write_text("the user's")
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)
    node.wait_state("m", "Missing")
    node.release("m")
    node.wait_phase("m", "Released")
    node.link("wake", "/dev/null")
    node.wait_state("wake", "Ignored")
    assert node.volumes()["m"].uid == old.uid
    subprocess.run(["mount", device, str(mounted)], check=True)
    node.volume("m", other_than=old.uid)
    assert [path.name for path in mounted.iterdir()] == ["lost+found"]


def test_a_volume_in_use_by_a_pod_is_not_wiped(block: Any, tmp_path: Path) -> None:
    """The kubelet's loop device over a raw volume; then it lets go."""
    loop = block.disks.attach(Path(block.disk.path))
    old = block.use_and_release("d")
    assert "in use through" in block.wait_event("CleaningFailed").message
    assert block.disk.read(0, len(SECRET)) == SECRET
    block.disks.detach(loop)
    block.cli("clean", str(block.entries / "d"))
    block.volume("d", other_than=old.uid)
    assert block.disk.is_blank()


def test_no_wipe_without_approval_where_the_class_wants_it(node: Any) -> None:
    node.class_("-b")
    node.configure(b=node.block(cleanPolicy="manual"))
    disk = node.disks.disk("a", data=SECRET)
    node.link("d", disk)
    node.agent.start()
    old = node.use_and_release("d")
    node.wait_state("d", "NeedsApproval")
    assert disk.read(0, len(SECRET)) == SECRET
    node.cli("clean", "--wait", str(node.entries / "d"))
    node.volume("d", other_than=old.uid)
    assert disk.is_blank()
    # An approval is for once.
    again = node.use_and_release("d")
    node.wait_state("d", "NeedsApproval")
    assert node.volumes()["d"].uid == again.uid


def test_a_disk_without_hardware_ids_is_not_wiped_by_itself(node: Any) -> None:
    node.class_("-b")
    node.configure(b=node.block(identity="hardware"))
    disk = node.disks.disk("a", data=SECRET)
    node.link("d", disk)
    node.agent.start()
    node.use_and_release("d")
    node.wait_state("d", "NeedsApproval")
    assert disk.read(0, len(SECRET)) == SECRET


def test_many_volumes_released_at_once_wait(node: Any) -> None:
    node.class_("-b")
    node.configure(b=node.block())
    made = {name: node.disks.disk(name, data=SECRET) for name in "abc"}
    for name, disk in made.items():
        node.link(name, disk)
    node.agent.flags = ["--brake-volumes=2", "--brake-pause=1h", "--parallel-wipes=1"]
    node.agent.start()
    for name in made:
        node.bind(name)
    node.agent.kill()
    for name in made:
        node.release(name)
    for name in made:
        node.wait_phase(name, "Released")
    node.agent.start()
    for name in made:
        node.wait_state(name, "Held")
    node.wait_event("Held")
    assert "brake: more than 2 volumes" in node.cli("list")
    assert all(disk.read(0, len(SECRET)) == SECRET for disk in made.values())
    old = node.volumes()["b"]
    node.cli("clean", old.name)
    node.volume("b", other_than=old.uid)
    assert made["b"].is_blank()
    assert made["a"].read(0, len(SECRET)) == SECRET


def test_a_dry_run_cleans_nothing(node: Any) -> None:
    node.class_("-b")
    node.configure(b=node.block())
    disk = node.disks.disk("a", data=SECRET)
    node.link("d", disk)
    node.agent.start("--dry-run=true")
    node.use_and_release("d")
    node.wait_state("d", "WouldClean")
    assert disk.read(0, len(SECRET)) == SECRET


def test_volumes_of_a_removed_class_are_still_cleaned(block: Any) -> None:
    """L8: a class that is gone strands its released volumes."""
    block.bind("d")
    block.wait_state("d", "Bound")
    block.configure()
    old = block.release("d")
    block.wait(lambda: "d" not in block.volumes(), "the volume is cleaned and deleted")
    assert block.disk.is_blank()
    assert old.spec.storage_class_name.endswith("-b")


def test_a_node_object_made_anew_keeps_its_volumes(block: Any) -> None:
    volume = block.bind("d")
    block.agent.kill()
    found = block.api.get(PlainNode, block.name)
    block.api.delete(PlainNode, block.name, uid=found.uid)
    block.register()
    block.agent.start()
    block.wait_state("d", "Bound")
    block.release("d")
    block.volume("d", other_than=volume.uid)
    assert block.disk.is_blank()


def test_retire_takes_a_free_disk_out_of_service_and_offer_brings_it_back(block: Any) -> None:
    block.cli("retire", str(block.entries / "d"))
    block.wait_state("d", "Retired")
    block.wait(lambda: block.volumes() == {}, "its volume is gone")
    block.agent.kill()
    block.agent.start()
    block.wait_state("d", "Retired")
    assert block.disk.read(0, len(SECRET)) == SECRET
    block.cli("offer", str(block.entries / "d"))
    block.volume("d")


def test_a_disk_retired_while_it_is_used_goes_when_it_is_clean(block: Any) -> None:
    volume = block.bind("d")
    block.cli("retire", volume.name)
    block.link("wake", "/dev/null")
    block.wait_state("wake", "Ignored")
    assert block.volumes()["d"].status.phase == "Bound"
    block.release("d")
    block.wait_state("d", "Retired")
    assert block.volumes() == {}
    assert block.disk.is_blank()


def test_a_wipe_is_cut_short_by_sigterm_and_goes_on(node: Any) -> None:
    node.class_("-b")
    size = 4 * blocks.STEP[MethodKind.OVERWRITE]
    node.configure(b=node.block(cleanMethod="overwrite:1"))
    disk = node.disks.disk("a", size)
    disk.write(SECRET, size - len(SECRET))
    node.link("d", disk)
    node.agent.start()
    old = node.use_and_release("d")
    ratio = f"{PREFIX}clean_progress_ratio"
    node.wait(lambda: node.agent.metric(ratio) > 0, "the first step is done")
    assert node.agent.stop() == 0
    node.agent.start()
    node.volume("d", other_than=old.uid)
    # The second life has wiped less than all of it.
    assert 0 < node.agent.metric(f"{PREFIX}bytes_wiped_total") < size
    assert disk.is_blank()
    os.truncate(disk.image, 0)
