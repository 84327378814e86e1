"""Removes what is in a mounted directory: by descriptors, never across a mount or by a link."""

from __future__ import annotations

import os
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from external_storage import confine, mountinfo
from external_storage.confine import Confined
from local_volume_provisioner import devices, identity
from local_volume_provisioner.cleaning.guard import Refused
from local_volume_provisioner.identity import Identity
from local_volume_provisioner.mounts import MountTable, file_system_uuid

LOST_AND_FOUND = "lost+found"


class MountTask(msgspec.Struct, frozen=True):
    """Which mount, as it was when it was decided to clean it."""

    mount_path: str
    number: int
    identity: Identity


def clean(task: MountTask, seconds: float) -> bool:
    """Remove for at most ``seconds``; False: call again to go on. Refused, OSError.

    What cannot be removed does not keep the rest from being removed; the first error is raised.
    """
    end = time.monotonic() + seconds
    with _opened(task) as base:
        _check_unused(task, base)
        errors: list[OSError] = []
        for name in base.listdir():
            try:
                if not _remove(base, name, end):
                    return False
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        left = _left(base)
    if left:
        raise Refused(f"somebody writes to it: {len(left)} new entries")
    return True


def probe(task: MountTask) -> None:
    """That it is what it was, and that no pod has it. Refused."""
    with _opened(task) as base:
        _check_unused(task, base)


def is_empty(task: MountTask) -> bool:
    """Whether it holds no files, but for an empty ``lost+found``; False where nobody can tell."""
    try:
        with _opened(task) as base:
            return not _left(base)
    except (OSError, Refused):
        return False


def _left(base: Confined) -> list[str]:
    names = base.listdir()
    if LOST_AND_FOUND in names and _is_kept(base) and not base.listdir(LOST_AND_FOUND):
        names.remove(LOST_AND_FOUND)
    return names


def _opened(task: MountTask) -> Confined:
    """The directory, opened once: an unmount from now on cannot put another one in its place."""
    try:
        base = Confined(Path(task.mount_path))
    except OSError as error:
        raise Refused(f"{task.mount_path}: {error.strerror}") from error
    try:
        _check(base, task)
    except BaseException:
        base.close()
        raise
    return base


def _check(base: Confined, task: MountTask) -> None:
    try:
        mount = mountinfo.of_descriptor(base.fileno())
    except LookupError as error:
        raise Refused("it has been unmounted") from error
    if mount.mount_point != task.mount_path:
        raise Refused(f"nothing is mounted at {task.mount_path}")
    device = None
    with suppress(OSError):
        device = devices.read(task.number)
    now = identity.of_mount(mount, file_system_uuid(base.fileno(), mount), device)
    if now != task.identity:
        raise Refused(f"another file system: {identity.compare(task.identity, now).why}")


def _check_unused(task: MountTask, base: Confined) -> None:
    """Other mounts of the same directory: the kubelet's, for a pod that still runs."""
    mount = mountinfo.of_descriptor(base.fileno())
    for other in MountTable.read().mounts:
        if (
            other.mount_id != mount.mount_id
            and other.device == mount.device
            and other.root == mount.root
            and "/kubernetes.io~local-volume/" in other.mount_point
        ):
            raise Refused(f"a pod has it mounted at {other.mount_point}")


def _remove(base: Confined, name: str, end: float) -> bool:
    def stop() -> bool:
        return time.monotonic() > end

    if name == LOST_AND_FOUND and _is_kept(base):
        # The file system's own directory; what fsck has put into it was the user's.
        return all(base.remove_tree((name, inner), stop=stop) for inner in base.listdir(name))
    try:
        confine.check((name,))
    except ValueError:
        # A name that nobody writes on purpose, and that must not keep the rest from going.
        plain = f".removing-{secrets.token_hex(8)}"
        os.rename(name, plain, src_dir_fd=base.fileno(), dst_dir_fd=base.fileno())
        name = plain
    return base.remove_tree((name,), stop=stop)


def _is_kept(base: Confined) -> bool:
    found = base.stat(LOST_AND_FOUND)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == 0
