"""Which disk it is: three ranks, and what each may decide."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_volume_provisioner import identity
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
        (MOUNT, changed(MOUNT, file_system=""), Verdict.DIFFERENT),
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
        # But for a mount whose file system says that it is the one.
        by_uuid = one.kind == "mount" and one.file_system and compare(one, other).verdict
        assert compare(one, other).verdict is Verdict.DIFFERENT or by_uuid is Verdict.SAME


@given(ids)
def test_it_is_written_and_read_again(one: Identity) -> None:
    assert identity.decode(identity.encode(one)) == one


@given(st.text(max_size=50))
def test_an_annotation_can_be_anything(text: str) -> None:
    identity.decode(text)
