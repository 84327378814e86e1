"""Commands that open the device themselves: ``reformat``, and what the class names.

They cannot inherit our exclusive open. So it is given up after the check, a lock is kept, and they
get a device node that is made for them from the number that was checked: no link that somebody
turns leads them elsewhere. Afterwards it is looked whether it still is the same, unused disk.
"""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from local_volume_provisioner.cleaning import blocks
from local_volume_provisioner.cleaning.guard import DeviceTask, Refused, check, exclusively

_KEPT = 4096


class CommandFailed(Exception):
    """How it ended, and the end of what it said."""


def run(task: DeviceTask, command: tuple[str, ...], run_directory: str) -> str:
    """Run the class's command with ``LOCAL_PV_BLKDEVICE``; the end of its output."""
    with _handed_over(task, Path(run_directory)) as node:
        return _run(list(command), node)


def reformat(task: DeviceTask, mkfs: tuple[str, ...], run_directory: str) -> str:
    """Signatures off, then a new file system; the end of what mkfs said."""
    with exclusively(task) as descriptor:
        blocks.zero_signatures(descriptor, task.identity.size)
        os.fsync(descriptor)
    with _handed_over(task, Path(run_directory)) as node:
        return _run([*mkfs, str(node)], node)


@contextmanager
def _handed_over(task: DeviceTask, directory: Path) -> Iterator[Path]:
    with exclusively(task) as descriptor:
        kept = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        # The last user's: a new file system has no place for them, and they would make it busy.
        blocks.forget_partitions(descriptor, task.number)
        # While the exclusive open still protects it: a lock cannot be handed from one to the other.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        fcntl.flock(kept, fcntl.LOCK_EX | fcntl.LOCK_NB)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    node = directory / f"{os.major(task.number)}-{os.minor(task.number)}"
    try:
        node.unlink(missing_ok=True)
        os.mknod(node, stat.S_IFBLK | 0o600, task.number)
        yield node
        try:
            check(task)
        except Refused as error:
            raise CommandFailed(f"after the command: {error}") from error
        os.fsync(kept)
    finally:
        node.unlink(missing_ok=True)
        os.close(kept)


def _run(argv: list[str], node: Path) -> str:
    environment = {**os.environ, "LOCAL_PV_BLKDEVICE": str(node)}
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    except OSError as error:
        raise CommandFailed(f"{argv[0]}: {error.strerror}") from error
    said = done.stdout[-_KEPT:].decode(errors="replace").strip()
    if done.returncode:
        last = said.splitlines()[-1] if said else "it said nothing"
        raise CommandFailed(f"{argv[0]} ended with {done.returncode}: {last}")
    return said
