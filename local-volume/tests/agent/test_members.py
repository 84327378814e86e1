"""Disks that nobody uses at the moment, and that are not free all the same."""

from __future__ import annotations

import os
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest

from local_volume_provisioner.config import ClassConfig, VolumeMode
from local_volume_provisioner.mounts import MountTable
from local_volume_provisioner.offers import why_not_free
from local_volume_provisioner.scan import Scanner

MIB = 1 << 20
SECTOR = 512


def physical_volume() -> bytes:
    """The label of an LVM physical volume, as it is in the second sector."""
    body = (32).to_bytes(4, "little") + b"LVM2 001" + b"abcdefghijklmnopqrstuvwxyz012345"
    body = body.ljust(SECTOR - 20, b"\0")
    checksum = zlib.crc32(body, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    return b"LABELONE" + (1).to_bytes(8, "little") + checksum.to_bytes(4, "little") + body


@pytest.mark.parametrize(
    ("offset", "signature", "told"),
    [(SECTOR, physical_volume(), "LVM2_member"), (0, b"LUKS\xba\xbe\x00\x01", "crypto_LUKS")],
)
def test_a_disk_of_something_that_is_not_in_use_now_is_not_offered(
    node: Any, offset: int, signature: bytes, told: str
) -> None:
    """Of a volume group that is not active, say: the kernel does not know that it is anybody's."""
    node.class_("-b")
    node.configure(top={"minResyncPeriod": "1h"}, b=node.block())
    disk = node.disks.disk("a", 32 * MIB)
    disk.write(signature, offset)
    node.link("d", disk)
    node.agent.start()
    node.wait_state("d", "Busy")
    assert told in node.agent.entries()["d"]["reason"]
    assert node.volumes() == {}
    subprocess.run(["wipefs", "--all", "--quiet", disk.path], check=True)
    node.link("wake", "/dev/null")
    node.volume("d")


def test_whoever_activates_what_a_disk_is_part_of_does_not_find_it_taken(
    disks: Any, tmp_path: Path
) -> None:
    """The agent looks every few seconds: an exclusive open of it, however short, makes an lvcreate
    of its admin fail now and then."""
    disk = disks.disk("a", 32 * MIB)
    disk.write(physical_volume(), SECTOR)
    (tmp_path / "d").symlink_to(disk.path)
    place = str(tmp_path)
    kind = ClassConfig(name="c", host_dir=place, mount_dir=place, mode=VolumeMode.BLOCK)
    [[candidate]] = Scanner().scan({"c": kind}, MountTable.read()).candidates.values()
    admin = os.open(disk.path, os.O_RDONLY | os.O_EXCL)
    try:
        assert "LVM2_member" in why_not_free(candidate, None)
    finally:
        os.close(admin)


def test_a_partition_is_offered_beside_its_disk_whatever_their_names(node: Any) -> None:
    node.class_("-b")
    node.configure(b=node.block())
    disk = node.disks.disk("a", 32 * MIB)
    table = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", disk.path]
    subprocess.run(table, input=b",16M\n", check=True)
    subprocess.run(["partx", "--update", disk.path], check=True)
    node.link("a-disk", disk)
    node.link("b-partition", f"{disk.path}p1")
    node.agent.start()
    node.volume("b-partition")
    assert set(node.volumes()) == {"b-partition"}
