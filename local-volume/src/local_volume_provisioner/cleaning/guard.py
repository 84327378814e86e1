"""Opens a device for itself alone, or says why that must not be.

The kernel refuses an exclusive open while the device, or one of its partitions, is mounted in any
namespace, is swap, or belongs to LVM, md or another holder. What it does not refuse is looked for
besides: devices above, and loop devices, which the kubelet puts over raw volumes of running pods.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from local_volume_provisioner import devices, identity
from local_volume_provisioner.identity import Identity
from local_volume_provisioner.mounts import MountTable

if TYPE_CHECKING:
    # The process that wipes imports this module, and should not begin with the configuration's.
    from local_volume_provisioner.scan import Candidate

# Members of LVM, RAID, ZFS and the like, and encrypted disks. Not file systems: a disk that has one
# may be meant to be a volume with it.
_BLKID = ("blkid", "--probe", "--usages", "raid,crypto", "--match-tag", "TYPE", "--output", "value")
_BLKID_NOTHING = 2
_BLKID_S = 30.0
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


class Refused(Exception):
    """Nothing has been changed, and why."""


class DeviceTask(msgspec.Struct, frozen=True):
    """Which device, as it was when it was decided to clean it."""

    mount_path: str
    number: int
    identity: Identity


@contextmanager
def exclusively(task: DeviceTask) -> Iterator[int]:
    """A descriptor, for reading and writing, of the very device that was decided about. Refused."""
    descriptor = open_exclusively(task)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_exclusively(task: DeviceTask) -> int:
    """As ``exclusively``; the caller closes it."""
    _check_node(_stat(task.mount_path), task)
    try:
        # NONBLOCK: should it have become something else since, opening that must not hang.
        flags = os.O_RDWR | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(task.mount_path, flags)
    except OSError as error:
        raise Refused(_why_not_opened(error)) from error
    try:
        _check_node(os.fstat(descriptor), task)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        check(task)
    except BlockingIOError as error:
        os.close(descriptor)
        raise Refused("somebody else holds a lock on the device") from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def probe(task: DeviceTask) -> None:
    """That it could be opened and is what it was. Refused."""
    with exclusively(task):
        pass


def why_in_use(found: Candidate) -> str:
    """What keeps a device from being offered that discovery cannot see from its container: the
    kernel is asked, who knows of mounts in all namespaces. Empty for a free one."""
    try:
        flags = os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(found.mount_path, flags)
    except OSError as error:
        return _why_not_opened(error)
    number = os.fstat(descriptor).st_rdev
    # At once: whoever wants it for something else at this moment is refused for our sake.
    os.close(descriptor)
    if number != found.number:
        return "it leads to another device now"
    try:
        loops = devices.loops_over({number, *devices.read(number).partitions})
    except OSError as error:
        return f"it cannot be looked at: {error.strerror}"
    return f"it is in use through {', '.join(loops)}" if loops else ""


def why_anothers(found: Candidate) -> str:
    """What says that a disk which has never been a volume is part of something else, though nobody
    uses that now: a volume group that is not active, an array that is not assembled."""
    command = [*_BLKID, found.mount_path]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_BLKID_S,
            env={"PATH": _PATH},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"what is on it cannot be found out: {error}"
    if done.returncode not in (0, _BLKID_NOTHING):
        words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        return f"what is on it cannot be found out: blkid: {words}"
    kind = done.stdout.strip()
    return (
        f"it is a {kind}, part of something else; if that is no longer wanted, wipefs makes it free"
        if kind
        else ""
    )


def check(task: DeviceTask) -> None:
    """That this number still is this disk, and that nothing is above it. Refused."""
    try:
        device = devices.read(task.number)
    except OSError as error:
        raise Refused(f"the device is gone: {error.strerror}") from error
    if (now := identity.of_device(device)) != task.identity:
        raise Refused(f"another disk: {identity.compare(task.identity, now).why}")
    if device.read_only:
        raise Refused("the device is read-only")
    members = {device.number, *device.partitions}
    above = devices.above(device)
    if in_use := MountTable.read().using(above):
        raise Refused(f"a file system on it is mounted at {in_use[0]}")
    if above & devices.swaps():
        raise Refused("it is in use as swap")
    if len(above - members) > 0:
        raise Refused(f"it is part of {_names(above - members)}")
    try:
        loops = devices.loops_over(members)
    except OSError as error:
        raise Refused(f"who uses it cannot be asked: {error}") from error
    if loops:
        raise Refused(f"it is in use through {', '.join(loops)}: a pod has it as a raw volume")


def _names(numbers: set[int]) -> str:
    return ", ".join(sorted(devices.read(number).name for number in numbers))


def _stat(path: str) -> os.stat_result:
    try:
        return Path(path).stat()
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error


def _check_node(found: os.stat_result, task: DeviceTask) -> None:
    if not stat.S_ISBLK(found.st_mode):
        raise Refused(f"{task.mount_path} is no block device any more")
    if found.st_rdev != task.number:
        raise Refused(f"{task.mount_path} leads to another device now")


def _why_not_opened(error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return "the device is in use: mounted somewhere, or part of LVM, RAID or swap"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"the device cannot be written to: {error.strerror}"
    return f"the device cannot be opened: {error.strerror}"
