"""Disks that nobody uses at the moment, and that are not free all the same."""

from __future__ import annotations

import subprocess
import zlib
from typing import Any

import pytest

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
