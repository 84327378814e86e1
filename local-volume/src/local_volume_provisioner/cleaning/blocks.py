"""Wiping in steps, through one descriptor that stays open from the check to the last byte.

These functions run in a worker process, which holds that descriptor between the calls.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct

from local_volume_provisioner import devices
from local_volume_provisioner.cleaning.guard import DeviceTask, Refused, check, open_exclusively
from local_volume_provisioner.methods import Method, MethodKind

_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
_BLKPG = 0x1269
_BLKPG_DEL_PARTITION = 2
_PARTITION = struct.Struct("@qqi64s64s4x")
_BLKPG_ARGUMENT = struct.Struct("@iiiP")
_BLKGETSIZE64 = 0x80081272
_MIB = 1 << 20
_BUFFER = 4 * _MIB
_HEAD_AND_TAIL = 4 * _MIB
# btrfs has copies of its super block there, and says so even when the first one is gone.
_COPIES = (64 * _MIB, 256 << 30)
STEP = {
    MethodKind.ZERO: 512 * _MIB,
    MethodKind.DISCARD: 1024 * _MIB,
    MethodKind.OVERWRITE: 256 * _MIB,
}
"""Bytes between two checkpoints: a second or some of a disk's time."""


class Wipe:
    """One device being wiped."""

    def __init__(self, task: DeviceTask, method: Method) -> None:
        self.task = task
        self.method = method
        self.descriptor = open_exclusively(task)
        answer = fcntl.ioctl(self.descriptor, _BLKGETSIZE64, bytes(8))
        self.size: int = struct.unpack("<Q", answer)[0]
        if method.kind is MethodKind.OVERWRITE:
            flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)

    def step(self, offset: int, length: int, *, random: bool) -> None:
        """Wipe these bytes, and have them on the disk when it returns. Refused."""
        check(self.task)
        if self.method.kind is MethodKind.ZERO:
            zero_out(self.descriptor, offset, length)
        elif self.method.kind is MethodKind.DISCARD:
            discard(self.descriptor, offset, length)
        else:
            self._overwrite(offset, length, random=random)
        os.fsync(self.descriptor)

    def finish(self) -> None:
        """What is done once at the end; for ``signatures`` this is all."""
        check(self.task)
        if self.method.kind in (MethodKind.DISCARD, MethodKind.SIGNATURES):
            zero_signatures(self.descriptor, self.size)
        os.fsync(self.descriptor)
        forget_partitions(self.descriptor, self.task.number)

    def close(self) -> None:
        os.close(self.descriptor)

    def _overwrite(self, offset: int, length: int, *, random: bool) -> None:
        # Page-aligned, as O_DIRECT wants it: past the page cache the node's pods keep theirs.
        with mmap.mmap(-1, _BUFFER) as buffer, memoryview(buffer) as view:
            if random:
                view[:] = os.urandom(_BUFFER)
            end = offset + length
            while offset < end:
                part = view[: min(_BUFFER, end - offset)]
                offset += os.pwrite(self.descriptor, part, offset)
                part.release()


def zero_out(descriptor: int, offset: int, length: int) -> None:
    """Offloaded to the disk where it can be; the kernel writes zeroes where not."""
    fcntl.ioctl(descriptor, _BLKZEROOUT, struct.pack("<QQ", offset, length))


def discard(descriptor: int, offset: int, length: int) -> None:
    try:
        fcntl.ioctl(descriptor, _BLKDISCARD, struct.pack("<QQ", offset, length))
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
            raise Refused("the device cannot discard: use cleanMethod zero") from error
        raise


def zero_signatures(descriptor: int, size: int) -> None:
    """Where file systems, partition tables, RAID and LVM have what they are known by."""
    head = min(size, _HEAD_AND_TAIL)
    zero_out(descriptor, 0, head)
    tail = max(head, size - _HEAD_AND_TAIL)
    if tail < size:
        zero_out(descriptor, tail, size - tail)
    for offset in _COPIES:
        if offset + 2 * _MIB <= size:
            zero_out(descriptor, offset, 2 * _MIB)


def forget_partitions(descriptor: int, number: int) -> None:
    """The last user's partitions are gone from the disk: have the kernel drop them too.

    One by one: to read the table again (BLKRRPART) is refused by disks that are not scanned.
    """
    for partition in devices.read(number).partitions:
        index = devices.read(partition).partition
        data = ctypes.create_string_buffer(_PARTITION.pack(0, 0, index, b"", b""))
        address = ctypes.addressof(data)
        argument = _BLKPG_ARGUMENT.pack(_BLKPG_DEL_PARTITION, 0, _PARTITION.size, address)
        fcntl.ioctl(descriptor, _BLKPG, argument)


# -- called in the worker process

_open: Wipe | None = None


def begin(task: DeviceTask, method: Method) -> int:
    """Open and check; the size in bytes. Refused."""
    global _open  # the process has one device to wipe
    _open = Wipe(task, method)
    return _open.size


def step(offset: int, length: int, random: bool) -> None:
    _wipe().step(offset, length, random=random)


def finish() -> None:
    _wipe().finish()


def _wipe() -> Wipe:
    if _open is None:
        raise Refused("the process that held the device has ended")
    return _open
