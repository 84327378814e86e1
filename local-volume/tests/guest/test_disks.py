"""Disks that come, go, fail and are replaced, with the agent in the same machine."""

from __future__ import annotations

import pytest
from tests.guest.guest_node import BY_ID, HASTY, SIZE, GuestNode, digest, is_blank

from external_storage.testing import Disk

# An emulated guest is some ten times slower than its host, and the host may be busy.
pytestmark = pytest.mark.timeout(900)

SECTORS = SIZE // 512
IQN = "iqn.2026-01.com.example:disk"
RECORD = f"iscsiadm -m node -T {IQN} -p 127.0.0.1:3260"
LUN = f"/dev/disk/by-path/ip-127.0.0.1:3260-iscsi-{IQN}-lun-0"
# A file as a LUN, with the same ids each time.
EXPORT = f"""
import sys
from rtslib_fb import FabricModule, FileIOStorageObject, LUN, MappedLUN, NetworkPortal, NodeACL
from rtslib_fb import Target, TPG
store = FileIOStorageObject("disk", dev="/var/tmp/lun", size={SIZE}, wwn=sys.argv[1])
tpg = TPG(Target(FabricModule("iscsi"), "{IQN}"), 1)
NetworkPortal(tpg, "127.0.0.1", 3260)
lun = LUN(tpg, 0, store)
MappedLUN(NodeACL(tpg, "iqn.2024-01.test.external-storage:guest"), 0, lun)
tpg.set_attribute("authentication", "0")
tpg.enable = True
"""


def link_by_slot(node: GuestNode, disk: Disk) -> str:
    """Leads to whichever disk is in that slot."""
    find = ["find", "-L", "/dev/disk/by-path", "-samefile", node.guest.path(disk)]
    return node.guest.run(find).split()[0]


def fill(node: GuestNode, path: str) -> None:
    """Write somebody's data to a device of the guest."""
    size = f"$(blockdev --getsize64 {path})"
    node.guest.run(f"head -c {size} /dev/urandom > {path} && sync {path}")


def is_blank_inside(node: GuestNode, path: str) -> bool:
    """Whether every byte of a device of the guest is 0; read from the device, not from a cache."""
    compare = f"blockdev --flushbufs {path}; cmp -n $(blockdev --getsize64 {path}) {path} /dev/zero"
    return node.guest.execute(compare).returncode == 0


def make_group(node: GuestNode, group: str, disk: str) -> None:
    node.undo.callback(node.guest.run, f"vgremove -qqf {group}", check=False, timeout_s=120)
    node.guest.run(f"wipefs -qa {disk} && vgcreate -qq {group} {disk}", timeout_s=120)


def make_logical_volume(node: GuestNode, group: str) -> str:
    """All of the group but a few MiB for its own."""
    node.guest.run(f"lvcreate -qqy -Wn -l 100%FREE -n data {group}", timeout_s=120)
    return f"/dev/{group}/data"


def make_lun(node: GuestNode, unit: str) -> str:
    """The link to an iSCSI disk of the guest itself; ``unit`` is its serial number."""
    node.guest.run(f"head -c {SIZE} /dev/urandom > /var/tmp/lun")
    end = "from rtslib_fb import RTSRoot; RTSRoot().clear_existing(confirm=True)"
    node.undo.callback(node.guest.run, "rm -rf /var/tmp/lun /etc/iscsi/nodes")
    node.undo.callback(node.guest.run, ["python3", "-c", end], timeout_s=120)
    node.undo.callback(node.guest.run, f"{RECORD} --logout", check=False)
    return log_in(node, unit)


def log_in(node: GuestNode, unit: str) -> str:
    """Also after a reboot, which leaves nothing but the file."""
    node.guest.run(["python3", "-c", EXPORT, unit], timeout_s=120)
    node.guest.run(f"{RECORD} -o new && {RECORD} --login && udevadm settle")
    there = ["test", "-b", LUN]
    node.wait(lambda: node.guest.execute(there).returncode == 0, "the LUN is there")
    return LUN


def test_a_disk_is_wiped_by_itself_if_its_ids_are_as_good_as_its_class_wants(
    node: GuestNode,
) -> None:
    disks = {
        node.link("raw/serial", serial := node.plug(serial="GUEST-SERIAL")): serial,
        node.link("raw/wwn", wwn := node.plug(wwn=0x5000C50015EA71AD)): wwn,
        node.link("placed/bare", bare := node.plug()): bare,
        node.link("placed/scsi", scsi := node.plug(bus="scsi")): scsi,
    }
    asked = node.link("raw/bare", unknown := node.plug())
    before = digest(unknown)
    node.bind(*disks, asked)
    assert node.entry("/srv/volumes/raw/serial")["ids"] == {"serial": "GUEST-SERIAL"}
    assert node.entry("/srv/volumes/raw/wwn")["ids"]["wwn"] == "naa.5000c50015ea71ad"
    assert all(node.entry(path)["ids"] == {} for path in (asked, *list(disks)[2:]))
    released = node.release(*disks)
    waiting = node.release(asked)
    node.wait_cleaned(released)
    assert all(is_blank(disk) for disk in disks.values())
    node.wait_state(asked, "NeedsApproval")
    assert "local-volume clean" in node.wait_event("NeedsApproval", asked)
    assert digest(unknown) == before
    node.guest.run(["local-volume", "clean", asked])
    node.wait_cleaned(waiting)
    assert is_blank(unknown)


def test_a_disk_plugged_in_is_a_volume_and_one_pulled_out_is_missing_and_not_wiped(
    node: GuestNode,
) -> None:
    path = f"{BY_ID}/virtio-auto-1"
    node.undo.callback(node.forget, path)
    disk = node.plug(serial="auto-1")
    before = digest(disk)
    node.bind(path)
    node.unplug(disk)
    node.wait_state(path, "Missing")
    node.wait_event("Missing", path)
    released = node.release(path)
    node.wait_phase(path, "Released")
    node.wait_pass()
    node.wait_state(path, "Missing")
    # Nothing is taken for clean because it is not there.
    assert node.volumes()[path].uid == released[path]
    assert digest(disk) == before
    back = node.plug(disk.file, serial="auto-1")
    node.wait_cleaned(released)
    assert is_blank(back)


def test_a_physical_volume_is_not_offered_and_a_logical_one_is_and_is_wiped(
    node: GuestNode,
) -> None:
    disk = node.plug(serial="GUEST-PV")
    make_group(node, "vg-local", node.guest.path(disk))
    physical = node.link("raw/a-physical", disk)
    # Nothing uses it as yet, and the kernel knows of nothing.
    node.wait_state(physical, "Busy")
    assert "LVM2_member" in node.entry(physical)["reason"]
    volume = make_logical_volume(node, "vg-local")
    fill(node, volume)
    logical = node.link("raw/logical", volume)
    node.bind(logical)
    assert node.entry(logical)["ids"]["dm"].startswith("LVM-")
    node.wait_cleaned(node.release(logical))
    assert is_blank_inside(node, volume)
    assert physical not in node.volumes()
    # Its label and metadata are as they were.
    assert node.guest.run(["vgs", "--noheadings", "-o", "vg_name", "vg-local"]).strip()


def test_an_iscsi_disk_is_known_by_its_ids_and_wiped(node: GuestNode) -> None:
    link = make_lun(node, "5a1d6d38-2b1c-4f0e-9c57-3f0f5a3c9d11")
    path = node.link("raw/iscsi", link)
    node.bind(path)
    assert node.entry(path)["ids"]["wwn"].startswith("naa.6001405")
    node.wait_cleaned(node.release(path))
    assert is_blank_inside(node, link)


@pytest.mark.parametrize("known", [True, False], ids=["with-ids", "without-ids"])
def test_another_disk_behind_the_same_path_is_refused_and_not_written_to(
    node: GuestNode, known: bool
) -> None:
    first = node.plug(serial="GUEST-FIRST" if known else None)
    entry = "raw/replaced" if known else "placed/replaced"
    link = link_by_slot(node, first)
    path = node.link(entry, link)
    node.bind(path)
    node.unplug(first)
    second = node.plug(serial="GUEST-SECOND" if known else None)
    assert node.guest.run(f"readlink -f {link}").strip() == node.guest.path(second)
    before = digest(first), digest(second)
    node.wait_state(path, "IdentityMismatch")
    node.wait_event("IdentityMismatch", path)
    released = node.release(path)
    node.wait_phase(path, "Released")
    # Whoever asks.
    node.guest.run(["local-volume", "clean", path])
    node.wait_pass()
    node.wait_state(path, "IdentityMismatch")
    assert node.volumes()[path].uid == released[path]
    assert (digest(first), digest(second)) == before
    if known:
        # The right one again.
        node.unplug(second)
        first = node.plug(first.file, serial="GUEST-FIRST")
        node.wait_cleaned(released)
        assert is_blank(first)
        assert digest(second) == before[1]


def test_a_disk_with_errors_is_told_tried_again_left_alone_and_wiped_when_it_is_mended(
    node: GuestNode,
) -> None:
    disk = node.plug()
    device = node.guest.path(disk)
    good = f"0 {SECTORS} linear {device} 0"
    half = f"0 {SECTORS // 2} linear {device} 0\\n{SECTORS // 2} {SECTORS // 2} error"
    node.guest.run(f"dmsetup create failing --table '{good}'")
    node.undo.callback(node.guest.run, "dmsetup remove --retry failing")
    path = node.link("placed/failing", "/dev/mapper/failing")
    node.restart_agent("python3", "-c", HASTY)
    node.undo.callback(node.restart_agent)
    node.bind(path)
    node.guest.run(
        f"dmsetup suspend failing && printf '{half}' | dmsetup load failing && "
        "dmsetup resume failing"
    )
    secret = disk.file.read_bytes()[SIZE // 2 :]
    released = node.release(path)
    assert "Input/output error" in node.wait_event("CleaningFailed", path)
    found = node.wait_state(path, "NeedsAttention")
    assert "cleaning failed 8 times: " in found["reason"]
    assert "Input/output error" in node.wait_event("NeedsAttention", path)
    failures = "local_volume_provisioner_persistentvolume_delete_failed_total"
    counted = f'{failures}{{mode="Block",type="process"}} 8.0'
    node.wait(lambda: counted in (node.get("/metrics") or ""), "the failures are counted")
    assert node.volumes()[path].uid == released[path]
    assert disk.file.read_bytes()[SIZE // 2 :] == secret
    node.guest.run(
        f"dmsetup suspend failing && dmsetup load failing --table '{good}' && "
        "dmsetup resume failing"
    )
    node.guest.run(["local-volume", "clean", path])
    node.wait_cleaned(released)
    assert is_blank(disk)


def test_a_read_only_disk_is_not_offered_and_one_that_has_become_so_not_wiped(
    node: GuestNode,
) -> None:
    sealed = node.link("raw/sealed", node.plug(serial="GUEST-RO", read_only=True))
    disk = node.plug(serial="GUEST-RW")
    path = node.link("raw/turned", disk)
    before = digest(disk)
    node.bind(path)
    assert node.wait_state(sealed, "Busy")["reason"] == "it is read-only"
    assert sealed not in node.volumes()
    node.guest.run(["blockdev", "--setro", node.guest.path(disk)])
    released = node.release(path)
    assert "the device is read-only" in node.wait_event("CleaningFailed", path)
    assert digest(disk) == before
    node.guest.run(["blockdev", "--setrw", node.guest.path(disk)])
    node.wait_cleaned(released)
    assert is_blank(disk)


def test_after_a_reboot_every_disk_is_the_same_and_wiped_as_before(node: GuestNode) -> None:
    guest = node.guest
    raw, bare, below, mounted = node.plug(serial="GUEST-RAW"), node.plug(), node.plug(), node.plug()
    # Unlike that of any other disk from the beginning: the WWN has no more of it.
    unit = "8c27e0b4-7d15-4a92-b3f6-1e0d5a3c9d22"
    make_group(node, "vg-reboot", guest.path(below))
    volume = make_logical_volume(node, "vg-reboot")
    fill(node, volume)
    point = "/srv/volumes/mounts/files"
    guest.run(f"mkfs.ext4 -q -F -L reboot {guest.path(mounted)} && mkdir -p {point}")
    mount = f"mount LABEL=reboot {point}"
    guest.run(mount)
    node.undo.callback(node.forget, point)
    node.undo.callback(guest.run, f"umount {point} && rmdir {point}", check=False)
    paths = [
        node.link("raw/raw", f"{BY_ID}/virtio-GUEST-RAW"),
        node.link("placed/bare-too", link_by_slot(node, bare)),
        node.link("raw/logical-too", volume),
        node.link("raw/iscsi-too", make_lun(node, unit)),
        point,
    ]
    node.bind(*paths)
    # What its user does with a raw volume.
    device = guest.path(raw)
    guest.run(f"printf 'label: gpt\\nstart=1MiB, size=12MiB\\n' | sfdisk -q {device}")
    guest.run(f"udevadm settle && mkfs.ext4 -q {device}1 && echo data > {point}/file")
    node.reboot()
    guest.run("vgchange -qqay vg-reboot", timeout_s=120)
    log_in(node, unit)
    guest.run(mount)
    node.start_agent()
    for path in paths:
        found = node.wait_state(path, "Bound")
        assert found["identity"].startswith("likely" if "bare" in path else "same"), found
    released = node.release(*paths)
    node.wait_cleaned(released)
    assert is_blank(raw)
    assert is_blank(bare)
    assert guest.run(["ls", point]).split() == ["lost+found"]
