"""A guest that has booted, saved: every guest of its size goes on from there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from external_storage.testing.guest.errors import GuestError
from external_storage.testing.guest.image import (
    RUN_PROGRAMS,
    Image,
    building,
    digest,
    do,
    ensure_image,
    need,
    say,
)
from external_storage.testing.guest.machine import Hardware, Machine
from external_storage.testing.guest.ssh import Ssh
from external_storage.testing.processes import ProcessGroup, WorkDirectory

WORK_PREFIX = "external-storage-guest-"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of a guest that has booted."""

    directory: Path

    @property
    def root(self) -> Path:
        """What it has written to its root disk, qcow2 on the image's."""
        return self.directory / "root.qcow2"

    @property
    def state(self) -> Path:
        """Its memory and its devices."""
        return self.directory / "state"


def ensure_snapshot(hardware: Hardware) -> tuple[Image, Snapshot]:
    """The image, and a guest on ``hardware`` that has booted; made now if need be.

    Raises ``GuestError`` when they cannot be made.
    """
    need(RUN_PROGRAMS)
    image = ensure_image()
    # QEMU continues what it saved itself, on the same machine.
    version = do(["qemu-system-x86_64", "--version"])
    name = digest("\0".join((version, *hardware.command(image))).encode())
    snapshot = Snapshot(image.directory / f"booted-{hardware.memory_mib}m-{hardware.cpus}c-{name}")
    if not snapshot.directory.is_dir():
        with building(snapshot.directory) as wanted:
            if wanted:
                say(f"booting it once, with {hardware.memory_mib} MiB; 10 to 30 seconds")
                _make(image, hardware, snapshot)
    with contextlib.suppress(OSError):  # another user's
        os.utime(snapshot.directory)  # it is used: see prune
    return image, snapshot


def overlay(on: Path, target: Path, *, form: str) -> None:
    """An empty disk ``target`` on top of ``on``, which is of the format ``form``."""
    do(["qemu-img", "create", "-q", "-f", "qcow2", "-b", on, "-F", form, target])


def _make(image: Image, hardware: Hardware, snapshot: Snapshot) -> None:
    partial = Snapshot(snapshot.directory.with_name(f"{snapshot.directory.name}.partial"))
    shutil.rmtree(partial.directory, ignore_errors=True)
    partial.directory.mkdir()
    overlay(image.root, partial.root, form="raw")
    work = WorkDirectory(WORK_PREFIX)
    processes = ProcessGroup(work.path)
    machine = Machine(
        image=image,
        hardware=hardware,
        root=partial.root,
        directory=work.path,
        processes=processes,
    )
    try:
        machine.start()
        ssh = Ssh(image=image, directory=work.path, processes=processes)
        ssh.connect(machine.ssh_port, explain=machine.explain)
        # What is in no page of its memory need not be read at every start.
        ssh.execute("sync; echo 3 > /proc/sys/vm/drop_caches", limit_s=60)
        ssh.disconnect()
        _save(machine, partial.state)
        partial.directory.rename(snapshot.directory)
    finally:
        processes.kill_all()
        work.remove()


def _save(machine: Machine, target: Path) -> None:
    qmp = machine.qmp
    qmp.execute("stop")
    # By default it goes easy on a network, which there is none of here.
    qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
    qmp.execute("migrate-set-capabilities", {"capabilities": _capabilities(["events"])})
    qmp.execute("migrate", {"uri": f'exec:cat > "{target}"'})
    ends = ("completed", "failed", "cancelled")
    qmp.wait_for_event("MIGRATION", lambda data: data["status"] in ends)
    status = qmp.execute("query-migrate")
    if status["status"] != "completed":
        raise GuestError(f"QEMU could not save the guest: {status}")
    qmp.execute("quit")
    machine.wait_ended()


def _capabilities(names: Sequence[str]) -> list[dict[str, object]]:
    return [{"capability": name, "state": True} for name in names]
