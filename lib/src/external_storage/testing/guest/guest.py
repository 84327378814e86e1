"""A machine with a storage kernel of its own: NFS, iSCSI, LVM, quotas, disks that come and go."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from external_storage.testing.guest import disks, install, programs
from external_storage.testing.guest.disks import Bus, Disk
from external_storage.testing.guest.errors import CommandFailed, ConnectionLost, GuestError
from external_storage.testing.guest.machine import HOST, Hardware, Machine, Tap, forward_rule
from external_storage.testing.guest.programs import GuestProcess
from external_storage.testing.guest.snapshot import WORK_PREFIX, ensure_snapshot, overlay
from external_storage.testing.guest.ssh import Ssh
from external_storage.testing.processes import ProcessGroup, WorkDirectory, free_port

_FORWARD_ATTEMPTS: Final = 5


class Guest:
    """One virtual machine, from ``start()`` to ``stop()``; use it as a context manager.

    Debian with its cloud kernel, emulated: no hardware support is needed, and it is some ten times
    slower than the host. Everything runs as root there. What it writes is on disks of its own and
    gone after ``stop()``. When this process is killed instead, the kernel kills the machine with it
    and the next start removes its files.

    One thread at a time may start, stop and change it; any thread may ``run`` commands.
    """

    def __init__(
        self,
        *,
        name: str = "guest",
        memory_mib: int = 512,
        cpus: int = 2,
        tap: Tap | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        """Says what to run; starts nothing.

        ``name``: its host name. ``memory_mib``, ``cpus``: each combination is booted once and kept
        in the cache. ``tap``: join this network in place of QEMU's own. ``prefix``: put before the
        command lines of QEMU and ssh, to run them in another network namespace, for example
        ``("nsenter", "-t", "4711", "-n")``; forwarded ports are then there too.
        """
        self.name: Final = name
        self._hardware = Hardware(memory_mib=memory_mib, cpus=cpus)
        self._tap = tap
        self._prefix = tuple(prefix)
        self._directory: WorkDirectory | None = None
        self._processes: ProcessGroup | None = None
        self._machine: Machine | None = None
        self._ssh: Ssh | None = None
        self._disks: list[Disk] = []
        self._site: Disk | None = None
        self._forwards: dict[int, int] = {}
        self._count = itertools.count(1)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # Starting and stopping

    def start(self) -> None:
        """Start it from its saved state and return when commands can be run in it.

        What is missing in the cache is built first, which takes minutes and root. Raises
        ``GuestError`` when that fails, when a program is missing, or with the end of the console.
        """
        if self._directory is not None:
            raise GuestError("the guest has been started already")
        image, snapshot = ensure_snapshot(self._hardware)
        try:
            self._directory = WorkDirectory(WORK_PREFIX)
            self._processes = ProcessGroup(self.directory)
            root = self.directory / "root.qcow2"
            overlay(snapshot.root, root, form="qcow2")
            self._ssh = Ssh(
                image=image,
                directory=self.directory,
                processes=self._processes,
                prefix=self._prefix,
            )
            self._machine = Machine(
                image=image,
                hardware=self._hardware,
                root=root,
                directory=self.directory,
                processes=self._processes,
                prefix=self._prefix,
                tap=self._tap,
            )
            self._machine.start(state=snapshot.state)
            self._settle_in()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it at once and delete its disks; nothing when it does not run."""
        if self._processes is not None:
            self._processes.kill_all()
        if self._directory is not None:
            self._directory.remove()
        self._directory = self._processes = self._machine = self._ssh = None
        self._disks, self._forwards, self._site = [], {}, None

    def reboot(self) -> None:
        """End its programs, unmount, shut down, and boot again with the same disks and ports.

        Raises ``GuestError`` when it does not go down, or does not come up.
        """
        machine = self._running()
        # Its answer may be lost with the connection; what counts is that the machine ends.
        with contextlib.suppress(GuestError):
            self.run("busybox poweroff")
        machine.wait_ended()
        self._connection().disconnect()
        self.start_again()

    def power_cut(self) -> None:
        """End it as a power cut does.

        What was in its memory is lost, and so is what was not written to a disk yet. What a program
        has synced is there after ``start_again()``. A disk's own cache is not lost: what the guest
        has sent to a disk stays there, also without a flush.
        """
        self._running().kill()
        self._connection().disconnect()

    def start_again(self) -> None:
        """Boot it after ``power_cut()``; disks may have been added and removed meanwhile."""
        machine = self._running()
        if machine.running:
            raise GuestError("the guest runs already")
        plugs = [disk.plug for disk in self._disks]
        machine.start(plugs=plugs, forwards=self._forwards)
        self._settle_in()
        if self._site is not None:
            self.run(install.mount(self.path(self._site)))

    def cut_network(self) -> None:
        """Pull the cable of its network card; commands can still be run in it."""
        self._set_link(up=False)

    def mend_network(self) -> None:
        """Put the cable in again."""
        self._set_link(up=True)

    # Commands and files

    def run(
        self,
        command: str | Sequence[str],
        *,
        input: str | None = None,
        check: bool = True,
        timeout_s: float = 60.0,
    ) -> str:
        """The standard output of a command, a line for the shell or a program with its arguments.

        Raises ``CommandFailed`` for another exit code than 0, unless ``check`` is false;
        ``GuestError`` when it has not ended after ``timeout_s`` seconds, or the guest is gone.
        """
        line = command if isinstance(command, str) else shlex.join(command)
        done = self.execute(line, input=input, timeout_s=timeout_s)
        if check and done.returncode != 0:
            raise CommandFailed(
                line, exit_code=done.returncode, output=done.stdout, error=done.stderr
            )
        return done.stdout

    def execute(
        self, command: str | Sequence[str], *, input: str | None = None, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """As ``run``, whatever the exit code: that, standard output and standard error."""
        line = command if isinstance(command, str) else shlex.join(command)
        try:
            done = self._connection().execute(
                line, limit_s=timeout_s, input=None if input is None else input.encode()
            )
        except ConnectionLost as error:
            raise GuestError(f"{error}; {self._running().explain_end()}") from None
        return subprocess.CompletedProcess(
            line,
            done.returncode,
            stdout=done.stdout.decode(errors="replace"),
            stderr=done.stderr.decode(errors="replace"),
        )

    def popen(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> GuestProcess:
        """Start a program and return; a program that cannot be run shows as exit code 127."""
        return programs.start(self.run, argv, name=str(next(self._count)), env=env or {})

    def put(self, local: Path, remote: str, *, timeout_s: float = 300.0) -> None:
        """Copy a file to the path ``remote``, or what is in a directory into the one there.

        Directories above it are made.
        """
        self._connection().put(local, remote, limit_s=timeout_s)

    def get(self, remote: str, local: Path, *, timeout_s: float = 300.0) -> None:
        """Copy the file ``remote`` to the path ``local``."""
        self._connection().get(remote, local, limit_s=timeout_s)

    def install(self, *packages: Path) -> None:
        """Install Python packages from their source directories, with all they depend on.

        Give a package and the ones beside it that it needs in one call. Their modules can be
        imported in the guest, and their commands are on its ``PATH``. They are on a disk of their
        own. It replaces what was installed before.
        """
        image = install.site_image(packages)
        if self._site is not None and self._site.file == image:
            return
        if self._site is not None:
            self.run(install.UNMOUNT)
            self.remove_disk(self._site)
        self._site = self.add_disk(image=image, read_only=True, serial="python-packages")
        self.run(install.mount(self.path(self._site)))

    def kubeconfig(self, source: Path) -> str:
        """Copy a kubeconfig for a server on the host's 127.0.0.1 so that it works in the guest.

        The path there. The server's certificate must name ``host``: the one of ``ControlPlane``
        names 10.0.2.2.
        """
        text = source.read_text(encoding="utf-8").replace("//127.0.0.1:", f"//{self.host}:")
        target = f"/root/{source.name}-{next(self._count)}"
        quoted = shlex.quote(target)
        self.run(f"umask 077 && cat > {quoted}", input=text)
        return target

    @property
    def ssh(self) -> list[str]:
        """The command line, on the host, that logs in; a command may be added to it."""
        return self._connection().login(self._running().ssh_port)

    # The network

    @property
    def host(self) -> str:
        """The address of the host in the guest; on QEMU's own network it is the 127.0.0.1 there."""
        return HOST if self._tap is None else self._tap.host

    def forward(self, guest_port: int) -> int:
        """A port of the host's 127.0.0.1 that leads to ``guest_port``; kept over a reboot.

        The guest sees such connections coming from ``host``. Not with a tap device: there the
        guest has an address that can be reached.
        """
        if self._tap is not None:
            raise GuestError(f"on a tap device the guest is reached at {self._tap.address}")
        if guest_port in self._forwards:
            return self._forwards[guest_port]
        answer = ""
        for _ in range(_FORWARD_ATTEMPTS):
            port = free_port()
            rule = forward_rule(port, guest_port)
            answer = self._running().qmp.monitor(f"hostfwd_add data {rule}")
            if not answer:
                self._forwards[guest_port] = port
                return port
        raise GuestError(f"QEMU forwards no port to {guest_port} of the guest: {answer}")

    def serve_nfs(self, path: str, *, options: str = "rw,sync,no_root_squash") -> None:
        """Have the guest's kernel serve its directory ``path``, which is made, on its port 2049.

        ``options``: as in exports(5). Over NFS 4 it has the same path. Not kept over a reboot.
        """
        self.run(["guest-serve-nfs", path, options])

    # Disks

    def add_disk(
        self,
        size: int = 1024**3,
        *,
        image: Path | None = None,
        serial: str | None = None,
        wwn: int | None = None,
        bus: Bus | None = None,
        write_zeroes: bool = True,
        discard: bool = True,
        read_only: bool = False,
    ) -> Disk:
        """Plug in an empty disk of ``size`` bytes; when the guest is off, for its next start.

        ``image``: a raw file of the host that is the disk in place of an empty one; it stays.
        ``bus``: ``virtio`` (``/dev/vd?``), or ``scsi`` (``/dev/sd?``), which it is by default when
        a ``wwn`` is given. Raises ``ValueError`` for a disk that cannot be had.
        """
        bus = bus or ("virtio" if wwn is None else "scsi")
        disks.check(size=size, bus=bus, serial=serial, wwn=wwn, write_zeroes=write_zeroes)
        name = f"disk{next(self._count)}"
        disk = Disk(
            name=name,
            file=image or self.directory / f"{name}.raw",
            bus=bus,
            slot=disks.free_slot(bus, self._disks),
            serial=serial,
            wwn=wwn,
            write_zeroes=write_zeroes,
            discard=discard,
            read_only=read_only,
            is_ours=image is None,
        )
        if disk.is_ours:
            with disk.file.open("xb") as made:
                made.truncate(size)
        machine = self._running()
        if machine.running:
            machine.plug(disk.plug)
        self._disks.append(disk)
        if machine.running:
            self.path(disk)  # waits for it
        return disk

    def remove_disk(self, disk: Disk) -> None:
        """Pull a disk out, whatever is done with it in the guest, and delete its file."""
        machine = self._running()
        if machine.running:
            machine.unplug(disk.plug)
            self.run("udevadm settle")
        self._disks.remove(disk)
        if disk.is_ours:
            disk.file.unlink()

    def path(self, disk: Disk) -> str:
        """The device file of a disk, such as ``/dev/vdb``; another one, maybe, after a reboot."""
        return self.run(disk.find, timeout_s=300).strip()

    # Facts

    @property
    def directory(self) -> Path:
        """The working directory on the host: disks, sockets, logs. Gone after ``stop()``."""
        if self._directory is None:
            raise GuestError("the guest has not been started")
        return self._directory.path

    @property
    def pid(self) -> int:
        """The process id of QEMU."""
        return self._running().pid

    @property
    def running(self) -> bool:
        """Whether the machine is on."""
        return self._machine is not None and self._machine.running

    def console(self) -> str:
        """The end of what the guest has written to its console since it was started."""
        return self._running().console()

    # Inside

    def _settle_in(self) -> None:
        machine, ssh = self._running(), self._connection()
        ssh.connect(machine.ssh_port, explain=machine.explain)
        own = [] if self._tap is None else [self._tap.address, self._tap.host, self._tap.mac]
        argv = ["guest-awake", f"{time.time():.3f}", self.name, *own]
        done = ssh.execute(shlex.join(argv), limit_s=120, input=os.urandom(64))
        if done.returncode != 0:
            raise GuestError(f"the guest cannot be set up: {done.stderr.decode(errors='replace')}")

    def _set_link(self, *, up: bool) -> None:
        self._running().qmp.execute("set_link", {"name": "data-card", "up": up})

    def _running(self) -> Machine:
        if self._machine is None:
            raise GuestError("the guest has not been started")
        return self._machine

    def _connection(self) -> Ssh:
        if self._ssh is None:
            raise GuestError("the guest has not been started")
        return self._ssh
