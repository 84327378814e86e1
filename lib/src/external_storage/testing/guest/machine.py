"""One run of QEMU: its command line, its process, its end."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from external_storage.testing.guest.errors import GuestError
from external_storage.testing.guest.image import Image
from external_storage.testing.guest.qmp import Qmp
from external_storage.testing.processes import (
    Process,
    ProcessGroup,
    describe_exit,
    free_port,
    log_tail,
)

HOST: Final = "10.0.2.2"
"""What the guest calls the host's 127.0.0.1."""
ADDRESS: Final = "10.0.2.15"
START_LIMIT_S: Final = 240.0
"""Far above what a start takes: it is waited out only where one never ends."""
UP: Final = "guest: up"
"""What the guest writes to its console when it has booted."""

_POLL_S: Final = 0.02
_START_ATTEMPTS: Final = 5
_LAST_MOMENT_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """A network of the test's own in place of QEMU's: a bridge with a tap device on it."""

    interface: str
    """The tap device; it exists already, in the network namespace that QEMU is started in."""
    address: str
    """The guest's address there, with the length of the prefix: ``10.77.0.2/24``."""
    host: str
    """The address of the host there; the guest's default route."""

    @property
    def mac(self) -> str:
        """The card's own address, by the other: from the saved state it would be every guest's."""
        numbers = self.address.partition("/")[0].split(".")
        return "52:54:" + ":".join(f"{int(number):02x}" for number in numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a machine has. A started one can only be continued on the same."""

    memory_mib: int = 512
    cpus: int = 2

    def command(self, image: Image) -> list[str]:
        """QEMU's command line, without the disks and what stands behind the network cards."""
        return [
            # An old one: what newer ones have to copy fast (erms) and to protect the kernel (smap)
            # is slow when it is emulated. With "max", programs take up to twice as long.
            *("qemu-system-x86_64", "-cpu", "Nehalem"),
            # Without tb-size the cache of translated code grows to more than a gigabyte. Programs
            # that need more memory need more of it: when it is full, it is all thrown away.
            *("-accel", f"tcg,thread=multi,tb-size={self.memory_mib // 4}"),
            # Not q35: on "pc" a disk can be plugged into any slot, without a bridge for each.
            *("-machine", "pc", "-smp", str(self.cpus), "-m", f"{self.memory_mib}M"),
            *("-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", _KERNEL),
            *("-device", "virtio-blk-pci,drive=root,addr=0x2"),
            *("-device", "virtio-net-pci,id=control-card,netdev=control,romfile=,addr=0x3"),
            *("-device", "virtio-net-pci,id=data-card,netdev=data,romfile=,addr=0x4"),
            *("-device", f"virtio-scsi-pci,id=scsi,addr={SCSI_SLOT:#x}"),
            *("-device", "virtio-rng-pci,addr=0x6"),
            *("-serial", "chardev:console"),
        ]


SCSI_SLOT: Final = 5
# panic=-1 reboots at once, and -no-reboot makes that the end of QEMU, which we see.
# norandmaps: a program at another address would be translated anew at each start.
_KERNEL: Final = "console=ttyS0 quiet panic=-1 mitigations=off norandmaps net.ifnames=0"


@dataclass(frozen=True, slots=True)
class Plug:
    """Something plugged into the machine: what QEMU is told, at its start or later."""

    blockdev: Mapping[str, Any]
    device: Mapping[str, Any]


@dataclass(kw_only=True)
class Machine:
    """Starts QEMU, any number of times, each on what the one before has left on its disks."""

    image: Image
    hardware: Hardware
    root: Path
    """The root disk, qcow2, in the directory."""
    directory: Path
    processes: ProcessGroup
    prefix: Sequence[str] = ()
    """Put before every command line, to enter a network namespace."""
    tap: Tap | None = None
    ssh_port: int = field(default=0, init=False)
    """The port of 127.0.0.1 that leads to the guest's sshd."""
    _starts: int = field(default=0, init=False)
    _qmp: Qmp | None = field(default=None, init=False)

    def start(
        self,
        *,
        state: Path | None = None,
        plugs: Sequence[Plug] = (),
        forwards: Mapping[int, int] | None = None,
    ) -> None:
        """Start it, by booting or from a saved ``state``; returns when the guest is up.

        ``plugs``: disks that are there from the beginning; none with a state. ``forwards``: ports
        of 127.0.0.1 by the guest's. Raises ``GuestError`` with the end of its console.
        """
        for attempt in range(1, _START_ATTEMPTS + 1):
            self.ssh_port = free_port()
            self._starts += 1
            command = [*self._command(plugs, forwards or {}), *_incoming(state)]
            process = self.processes.start("qemu", [*self.prefix, *command])
            try:
                self._wait_until_up(process, booted=state is None)
            except BaseException as error:
                self.kill()
                # Another process has taken the port since it was found to be free.
                taken = "Could not set up host forwarding rule" in str(error)
                if not taken or forwards or attempt == _START_ATTEMPTS:
                    raise
            else:
                return

    def kill(self) -> None:
        """End it now, as when the power fails; nothing when it does not run."""
        self.processes.stop("qemu", limit_s=0)
        self._disconnect()

    def wait_ended(self) -> None:
        """Wait until the guest has ended the machine; else ``GuestError``."""
        process = self._process()
        if process is None:
            return
        try:
            process.popen.wait(START_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise GuestError(f"the guest has not gone down\n{self.console()}") from None
        self.kill()

    @property
    def pid(self) -> int:
        """The process id of QEMU."""
        process = self._process()
        if process is None or process.exit_code is not None:
            raise GuestError("the guest does not run")
        return process.pid

    @property
    def running(self) -> bool:
        process = self._process()
        return process is not None and process.exit_code is None

    @property
    def qmp(self) -> Qmp:
        """The connection to QEMU. Raises ``GuestError`` when it does not run."""
        if self._qmp is None:
            raise GuestError("the guest does not run")
        return self._qmp

    def plug(self, plug: Plug) -> None:
        """Plug a disk in."""
        self.qmp.execute("blockdev-add", plug.blockdev)
        try:
            self.qmp.execute("device_add", plug.device)
        except GuestError:
            self.qmp.execute("blockdev-del", {"node-name": plug.blockdev["node-name"]})
            raise

    def unplug(self, plug: Plug) -> None:
        """Pull a disk out, and wait until the guest has let go of it."""
        name = plug.device["id"]
        self.qmp.execute("device_del", {"id": name})
        self.qmp.wait_for_event("DEVICE_DELETED", lambda data: data.get("device") == name)
        self.qmp.execute("blockdev-del", {"node-name": plug.blockdev["node-name"]})

    def explain(self) -> str:
        """Whether it runs, and the ends of what QEMU and the guest have written."""
        process = self._process()
        if process is None:
            how = "QEMU does not run"
        elif process.exit_code is None:
            how = "QEMU runs"
        else:
            how = f"QEMU {describe_exit(process.exit_code)}"
        return f"{how}; its log ends:\n{log_tail(self._log)}\n{self.console()}"

    def explain_end(self) -> str:
        """As ``explain``, after the connection has broken: QEMU may need a moment yet to end."""
        process = self._process()
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(_LAST_MOMENT_S)
        return self.explain()

    def console(self) -> str:
        """The end of the guest's console since its last start."""
        return f"the guest's console ends:\n{log_tail(self._console, 80)}"

    # -- inside

    @property
    def _log(self) -> Path:
        return self.directory / "qemu.log"

    @property
    def _console(self) -> Path:
        return self.directory / f"console-{self._starts}.log"

    def _process(self) -> Process | None:
        return next((p for p in self.processes.all() if p.name == "qemu"), None)

    def _command(self, plugs: Sequence[Plug], forwards: Mapping[int, int]) -> list[str]:
        root = {
            "driver": "qcow2",
            "node-name": "root",
            # The host's fsync is not needed: its page cache outlives QEMU, if not the host.
            "cache": {"no-flush": True},
            "file": {"driver": "file", "filename": str(self.root)},
        }
        ssh = f"hostfwd=tcp:127.0.0.1:{self.ssh_port}-10.0.3.15:22"
        command = [
            *self.hardware.command(self.image),
            *("-blockdev", json.dumps(root)),
            # Of its own, and it leads nowhere else: it works on while the network is cut.
            *("-netdev", f"user,id=control,ipv6=off,net=10.0.3.0/24,restrict=on,{ssh}"),
            *("-netdev", self._network(forwards)),
            *("-chardev", f"file,id=console,path={self._console.name}"),
            *("-qmp", "unix:qmp.sock,server=on,wait=off"),
        ]
        for plug in plugs:
            command += ["-blockdev", json.dumps(plug.blockdev), "-device", json.dumps(plug.device)]
        return command

    def _network(self, forwards: Mapping[int, int]) -> str:
        if self.tap is not None:
            # vnet_hdr off, or the card could do more than the one in the saved state.
            options = "script=no,downscript=no,vnet_hdr=off"
            return f"tap,id=data,ifname={self.tap.interface},{options}"
        rules = (f",hostfwd={forward_rule(port, to)}" for to, port in forwards.items())
        return "user,id=data,ipv6=off" + "".join(rules)

    def _wait_until_up(self, process: Process, *, booted: bool) -> None:
        self._wait(process, self._connect, "QEMU to answer")
        if booted:
            self._wait(process, self._is_up, "the guest to boot")
        else:
            self._wait(process, self._is_continued, "the guest to go on from its saved state")

    def _wait(self, process: Process, is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while not is_so():
            ended = process.exit_code is not None
            if ended or time.monotonic() > deadline:
                how = "ended" if ended else f"passed {START_LIMIT_S:.0f} s"
                raise GuestError(f"{how} while waiting for {what}: {self.explain()}")
            time.sleep(_POLL_S)

    def _connect(self) -> bool:
        try:
            self._qmp = Qmp(self.directory / "qmp.sock")
        except OSError:
            return False
        return True

    def _is_up(self) -> bool:
        return UP in log_tail(self._console, 200)

    def _is_continued(self) -> bool:
        status: str = self.qmp.execute("query-status")["status"]
        if status == "paused":  # as it was when it was saved
            self.qmp.execute("cont")
        return status == "running"

    def _disconnect(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
        self._qmp = None
        (self.directory / "qmp.sock").unlink(missing_ok=True)


def forward_rule(host_port: int, guest_port: int) -> str:
    """A port of the host that leads to one of the guest, as QEMU takes it."""
    return f"tcp:127.0.0.1:{host_port}-{ADDRESS}:{guest_port}"


def _incoming(state: Path | None) -> list[str]:
    return [] if state is None else ["-incoming", f"exec:cat {shlex.quote(str(state))}"]
