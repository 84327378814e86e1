"""Which disk it is: three ranks, and what each may decide."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_volume_provisioner import devices, identity
from local_volume_provisioner.identity import Identity, Verdict, compare

DISK = Identity(
    kind="device",
    hardware={"wwn": "naa.5000", "serial": "S1"},
    size=1 << 30,
    boot_id="boot-1",
    device="8:16",
    disk_sequence="7",
)
BARE = msgspec.structs.replace(DISK, hardware={})
PART = msgspec.structs.replace(BARE, part="1@1048576", partition_uuid="aa-01", device="8:17")
MOUNT = Identity(
    kind="mount", boot_id="boot-1", device="8:16", file_system="u-1", fs_type="ext4", root="/"
)
ON_DISK = msgspec.structs.replace(MOUNT, hardware={"wwn": "naa.5000"})
TMPFS = msgspec.structs.replace(
    MOUNT, file_system="", fs_type="tmpfs", device="0:50", source="none"
)


def changed(one: Identity, **fields: object) -> Identity:
    return msgspec.structs.replace(one, **fields)


@pytest.mark.parametrize(
    ("recorded", "current", "verdict"),
    [
        # The same disk under another number, in the same boot and after one.
        (DISK, changed(DISK, device="8:32", disk_sequence="9"), Verdict.SAME),
        (DISK, changed(DISK, device="8:32", boot_id="boot-2"), Verdict.SAME),
        (DISK, changed(DISK, hardware={"wwn": "naa.5000"}), Verdict.SAME),
        # Another one in its place.
        (DISK, changed(DISK, hardware={"wwn": "naa.6000", "serial": "S1"}), Verdict.DIFFERENT),
        (DISK, changed(DISK, size=1 << 29), Verdict.DIFFERENT),
        # A volume that has grown is the same.
        (DISK, changed(DISK, size=1 << 31), Verdict.SAME),
        # It had ids and shows none now.
        (DISK, changed(DISK, hardware={}), Verdict.UNKNOWN),
        (DISK, changed(DISK, hardware={"dm": "x"}), Verdict.UNKNOWN),
        # Without ids: the number is sure within one boot, and means nothing after it.
        (BARE, BARE, Verdict.LIKELY),
        (BARE, changed(BARE, disk_sequence="8"), Verdict.DIFFERENT),
        (BARE, changed(BARE, device="8:32"), Verdict.DIFFERENT),
        (BARE, changed(BARE, device="8:32", boot_id="boot-2"), Verdict.LIKELY),
        (BARE, changed(BARE, size=1 << 31, boot_id="boot-2"), Verdict.DIFFERENT),
        # Partitions.
        (PART, changed(PART, boot_id="boot-2"), Verdict.LIKELY),
        (PART, changed(PART, partition_uuid="bb-01"), Verdict.DIFFERENT),
        (PART, changed(PART, part="2@9"), Verdict.DIFFERENT),
        (PART, BARE, Verdict.DIFFERENT),
        # Mounts: by the file system's UUID, wherever the disk is now.
        (MOUNT, changed(MOUNT, device="8:99", boot_id="boot-2"), Verdict.SAME),
        (MOUNT, changed(MOUNT, file_system="u-2"), Verdict.DIFFERENT),
        # Its UUID can be read only sometimes: the disk may tell.
        (MOUNT, changed(MOUNT, file_system=""), Verdict.UNKNOWN),
        (changed(MOUNT, file_system=""), MOUNT, Verdict.UNKNOWN),
        (ON_DISK, changed(ON_DISK, file_system="", boot_id="boot-2"), Verdict.SAME),
        # A copy of it on another disk.
        (ON_DISK, changed(ON_DISK, hardware={"wwn": "naa.6000"}), Verdict.UNKNOWN),
        (ON_DISK, changed(ON_DISK, part="2@0"), Verdict.UNKNOWN),
        (MOUNT, changed(MOUNT, root="/other"), Verdict.DIFFERENT),
        (MOUNT, changed(MOUNT, fs_type="xfs"), Verdict.DIFFERENT),
        (TMPFS, TMPFS, Verdict.SAME),
        (TMPFS, changed(TMPFS, device="0:51"), Verdict.DIFFERENT),
        (TMPFS, changed(TMPFS, device="0:51", boot_id="boot-2"), Verdict.SAME),
        (MOUNT, DISK, Verdict.DIFFERENT),
    ],
)
def test_verdicts(recorded: Identity, current: Identity, verdict: Verdict) -> None:
    found = compare(recorded, current)
    assert found.verdict is verdict
    assert found.why


def test_content_does_not_count_for_a_device() -> None:
    """What a user has formatted a raw volume with is theirs: it says nothing about the disk."""
    found = compare(DISK, changed(DISK, file_system="made-by-the-user"))
    assert found.verdict is Verdict.SAME


ids = st.builds(
    Identity,
    kind=st.sampled_from(["device", "mount"]),
    hardware=st.dictionaries(st.sampled_from(["wwn", "serial"]), st.sampled_from("ab"), max_size=2),
    part=st.sampled_from(["", "1@0"]),
    size=st.sampled_from([0, 1, 2]),
    boot_id=st.sampled_from(["1", "2"]),
    device=st.sampled_from(["8:0", "8:1"]),
    file_system=st.sampled_from(["", "u"]),
)


@given(ids)
def test_what_has_not_changed_is_never_another_disk(one: Identity) -> None:
    assert compare(one, one).verdict in (Verdict.SAME, Verdict.LIKELY)


@given(ids, ids)
def test_different_hardware_is_never_the_same(one: Identity, other: Identity) -> None:
    common = one.hardware.keys() & other.hardware.keys()
    if any(one.hardware[key] != other.hardware[key] for key in common):
        # But for a mount whose file system may have been copied, or moved.
        by_uuid = one.kind == "mount" and one.file_system and compare(one, other).verdict
        assert compare(one, other).verdict is Verdict.DIFFERENT or by_uuid is Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("recorded", "current", "same"),
    [
        (DISK, changed(DISK, device="8:32", boot_id="boot-2"), True),
        (DISK, changed(BARE, device="8:32"), False),
        # Without ids: by the number, in this boot only.
        (BARE, BARE, True),
        (BARE, changed(BARE, device="8:32", boot_id="boot-2"), False),
        (MOUNT, changed(MOUNT, device="8:99", boot_id="boot-2"), True),
        (MOUNT, changed(MOUNT, root="/other"), False),
        (TMPFS, changed(TMPFS, boot_id="boot-2"), False),
        # A file system, and the device it is on.
        (ON_DISK, DISK, True),
        (MOUNT, changed(BARE, disk_sequence=""), True),
        (MOUNT, changed(BARE, device="8:32"), False),
    ],
)
def test_the_same_disk_under_another_name(
    recorded: Identity, current: Identity, same: bool
) -> None:
    assert identity.is_same_disk(recorded, current) is same
    assert not same or identity.marks(recorded) & identity.marks(current)


def test_what_is_written_down_follows_the_boot_and_keeps_what_cannot_be_read() -> None:
    now = changed(BARE, boot_id="boot-2", size=1 << 31)
    found = identity.refreshed(DISK, now)
    assert found == changed(now, hardware=DISK.hardware)


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("naa.5000c500a1b2c3d4", True),
        ("WD-WCC4N1234567", True),
        ("local-volume-1", True),
        ("", False),
        ("0000000000000000", False),
        ("QM00001", False),
        ("0QEMU    QEMU HARDDISK   drive-scsi0", False),
        ("0123456789ABCDEF", False),
        ("None", False),
    ],
)
def test_what_every_disk_says_is_no_id(text: str, is_id: bool) -> None:
    assert devices.is_id(text) is is_id


@given(ids)
def test_it_is_written_and_read_again(one: Identity) -> None:
    assert identity.decode(identity.encode(one)) == one


@given(st.text(max_size=50))
def test_an_annotation_can_be_anything(text: str) -> None:
    identity.decode(text)
