"""NFS-Ganesha and its private D-Bus as children of this process, kept running.

What hangs on what, in order of importance: the data path is Ganesha alone. The bus is for
managing it; its end is hidden from Ganesha by ``bus_relay`` and only pauses provisioning. Both
children die with this process, whatever ends it, so that a successor finds the port free and
nobody serves exports that nobody manages.
"""

from __future__ import annotations

import re
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from external_storage.logs import get_logger
from nfs_provisioner.bus_relay import BusRelay
from nfs_provisioner.exportmgr import BusUnavailable, ExportError, ExportManager
from nfs_provisioner.ganesha_config import GaneshaConfig
from nfs_provisioner.probe import null_call
from nfs_provisioner.supervisor import SupervisedProcess

log = get_logger(__name__)

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROGRAMS = {
    "ganesha.nfsd": "nfs-ganesha and nfs-ganesha-vfs",
    "dbus-daemon": "dbus-daemon",
    "setpriv": "util-linux",
}

# Where Ganesha looks up file systems; minimal container images come without it.
_MTAB = Path("/etc/mtab")

_PROBE_TIMEOUT_S = 2.0
_STARTING_S = 5.0
_LIFE_INTERVAL_S = 5.0
_LIFE_LIMIT_S = 60.0
_POLL_STARTING_S = 0.02
_POLL_S = 0.5
_GANESHA_PATIENCE_S = 10.0
_BUS_PATIENCE_S = 2.0

# Said at each start of an NFSv4-only server with sec=sys on a machine without rpcbind, Kerberos
# or Ceph, or told to the caller over D-Bus anyway. At their own level (up to CRIT) they would send
# an admin looking for a fault that is none.
_HARMLESS = re.compile(
    r"Cannot register NFS V4 on TCP|krb5|default realm|Missing RADOS URLs"
    r"|No export entries found|Method \(\w+\) on \(org|already active|Failed to set fd limit"
)
_LINE = re.compile(
    r".*? nfs-ganesha-\d+\[(?P<thread>[^\]]*)\] (?P<function>\S+) "
    r":(?P<component>[^:]+) :(?P<level>[A-Z_]+) :(?P<text>.*)"
)
# Twenty lines of each start and stop, at EVENT like the lines worth reading (grace, clients).
_CHATTER = re.compile(
    r"apply_logger_config_levels|init_\w+|nfs_Init\w+|nfs_Start_threads|lower_my_caps|destroy_fsals"
    r"|nfs_set_param_from_conf|nfs_rpc_cb_init_ccache|do_shutdown|nfs_start|rpc|fs_ng_read_recov\w+"
)
_LOUD = {"FATAL": log.error, "MAJ": log.error, "CRIT": log.error, "WARN": log.warning}
_QUIET = ("DEBUG", "M_DBG", "F_DBG")


class GaneshaError(Exception):
    """Ganesha could not be started; the message says why and ends with its last words."""


class Ganesha:
    """One NFS server: ``start()``, then ``serving()`` and ``manageable()`` at any time, ``stop()``.

    ``before_start`` is called before each start of the server process: the place to make sure that
    nothing among the export files can keep it from starting. ``on_restart`` is called after
    the server came back by itself and answers over D-Bus, in a thread of its own: the place to
    reconcile exports. Neither may start processes.
    """

    def __init__(
        self,
        config: GaneshaConfig,
        *,
        before_start: Callable[[], object] | None = None,
        on_restart: Callable[[], object] | None = None,
        start_timeout_s: float = 60.0,
    ) -> None:
        self.config = config
        self._before_start = before_start
        self._on_restart = on_restart
        self._start_timeout_s = start_timeout_s
        self._changed = threading.Event()
        self._stopping = threading.Event()
        self._ready = False
        self._looked_at = self._answered_at = float("-inf")
        self._settled = threading.Event()
        self._start_error: str | None = None
        self._thread: threading.Thread | None = None
        self._manager = ExportManager(config.bus_address, timeout_s=_PROBE_TIMEOUT_S)
        self._relay = BusRelay(relay_socket=config.relay_socket, bus_socket=config.bus_socket)
        self._bus = SupervisedProcess(
            "dbus-daemon",
            ("dbus-daemon", f"--config-file={config.bus_config_file}", "--nofork", "--nopidfile"),
            environment={"PATH": _PATH},
            on_line=_log_bus_line,
            changed=self._changed,
        )
        self._server = SupervisedProcess(
            "ganesha.nfsd",
            (
                *("ganesha.nfsd", "-F", "-f", str(config.config_file), "-p", str(config.pid_file)),
                # Its log goes through us to our standard error: in one format, and not into a file
                # that grows among the data. STDERR is Ganesha's own word for it.
                *("-L", "STDERR"),
            ),
            environment={"PATH": _PATH, "DBUS_SYSTEM_BUS_ADDRESS": config.relay_address},
            on_line=_log_server_line,
            changed=self._changed,
        )

    @property
    def ganesha_restarts(self) -> int:
        """How often the server process was started again after it had ended."""
        return self._server.restarts

    @property
    def bus_restarts(self) -> int:
        """How often dbus-daemon was started again after it had ended."""
        return self._bus.restarts

    @property
    def pid(self) -> int | None:
        """Of the server process, while it runs."""
        return self._server.pid

    @property
    def bus_pid(self) -> int | None:
        """Of dbus-daemon, while it runs."""
        return self._bus.pid

    def start(self) -> None:
        """Start both and return once the server takes connections and answers over D-Bus.

        Once per object. Raises ValueError for a bad configuration, OSError for its directories,
        GaneshaError if the server does not come up within the start timeout (seconds) or ends
        while starting; nothing is left running then.
        """
        if self._thread is not None or self._stopping.is_set():
            raise RuntimeError("a Ganesha is started once; make another one")
        for program, package in _PROGRAMS.items():
            if shutil.which(program, path=_PATH) is None:
                raise GaneshaError(f"{program} is not installed (package {package})")
        if not _MTAB.exists():
            # Ganesha would serve, and refuse every export with a riddle.
            raise GaneshaError(f"{_MTAB} is missing: ln -s /proc/self/mounts {_MTAB}")
        self.config.write()
        if (holder := self._port_trouble()) is not None:
            raise GaneshaError(holder)
        self._relay.start()
        self._thread = threading.Thread(target=self._supervise, name="ganesha", daemon=True)
        self._thread.start()
        self._settled.wait(self._start_timeout_s)
        if self._ready:
            return
        why = self._start_error or (
            f"not ready after {self._start_timeout_s:g} s:"
            f" {self.serving() or self.manageable() or 'was slow'}"
        )
        self.stop()
        raise GaneshaError(
            f"ganesha did not start: {why}\n{self._bus.tail()}\n{self._server.tail()}"
        )

    def stop(self) -> None:
        """Stop the server, then the bus; returns within about 13 s. Idempotent."""
        if self._thread is None:
            return
        self._stopping.set()
        self._changed.set()
        self._thread.join()
        self._thread = None
        self._relay.stop()
        self._manager.close()

    def serving(self) -> str | None:
        """None if the server answers on the NFS port, else the reason why not.

        Takes at most 2 s. This alone is what readiness may hang on: an unready pod loses its
        Service endpoint and with it every client.
        """
        try:
            null_call(self._probe_address(), timeout_s=_PROBE_TIMEOUT_S)
        except OSError as error:
            return f"no answer on NFS port {self.config.port}: {error}"
        return None

    def manageable(self) -> str | None:
        """None if exports can be added and removed now, else the reason why not (at most 4 s)."""
        try:
            self._manager.ping()
        except BusUnavailable as error:
            return str(error)
        return None

    def _supervise(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self._tend()
                except Exception:
                    # The end of this thread would be the end of both children (PDEATHSIG).
                    log.exception("ganesha supervisor step failed")
                self._changed.wait(self._until_next_look())
                self._changed.clear()
        finally:
            self._server.stop(patience_s=_GANESHA_PATIENCE_S)
            self._bus.stop(patience_s=_BUS_PATIENCE_S)

    def _until_next_look(self) -> float:
        """Seconds; a child's end is told by ``_changed``."""
        if self._server.pid is not None and not self._ready and self._age_s() < _STARTING_S:
            return _POLL_STARTING_S
        return max(0.01, min(_POLL_S, self._bus.wait_s(), self._server.wait_s()))

    def _tend(self) -> None:
        self._bus.ended()
        if self._bus.due():
            self.config.bus_socket.unlink(missing_ok=True)
            self._bus.spawn()
        if (how := self._server.ended()) is not None:
            self._ready = False
            if not self._settled.is_set():
                self._start_error = how
                self._settled.set()
                self._stopping.set()
                return
        if self._server.due():
            self._start_server()
        if not self._ready:
            self._look_for_ready()
        elif self._server.pid is not None:
            self._look_for_life()

    def _start_server(self) -> None:
        if (holder := self._port_trouble()) is not None:
            log.error("ganesha cannot be started", why=holder)
            self._server.put_off()
            return
        if self._before_start is not None:
            try:
                self._before_start()
            except Exception:
                # Serving with what there is beats not serving.
                log.exception("preparing the start of ganesha failed")
        self._server.spawn()

    def _look_for_ready(self) -> None:
        """Ready means: takes connections, and lists its exports (its D-Bus thread starts last)."""
        if self._server.pid is None:
            return
        if (why := self.serving()) is not None:
            # Never one that serves, however sick it looks over D-Bus: clients are using it.
            if self._age_s() > self._start_timeout_s:
                log.error("ganesha killed, it does not come up", why=why)
                self._server.kill()
            return
        try:
            exports = len(self._manager.show())
        except ExportError:
            return
        self._ready = True
        self._answered_at = time.monotonic()
        log.info("ganesha is ready", exports=exports, seconds=round(self._age_s(), 2))
        self._announce()

    def _age_s(self) -> float:
        return time.monotonic() - self._server.started_at

    def _look_for_life(self) -> None:
        """Kill a server that has not answered for a minute: every client of it hangs."""
        now = time.monotonic()
        if now - self._looked_at < _LIFE_INTERVAL_S:
            return
        self._looked_at = now
        why = self.serving()
        if why is None:
            self._answered_at = now
        elif now - self._answered_at > _LIFE_LIMIT_S:
            log.error("ganesha killed, it does not answer", why=why, seconds=_LIFE_LIMIT_S)
            self._server.kill()

    def _announce(self) -> None:
        if not self._settled.is_set():
            self._settled.set()
        elif self._on_restart is not None:
            threading.Thread(
                target=self._run_on_restart, name="ganesha-restarted", daemon=True
            ).start()

    def _run_on_restart(self) -> None:
        assert self._on_restart is not None
        try:
            self._on_restart()
        except Exception:
            log.exception("hook after the restart of ganesha failed")

    def _probe_address(self) -> tuple[str, int]:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(
            self.config.bind_address, self.config.bind_address
        )
        return host, self.config.port

    def _port_trouble(self) -> str | None:
        """Why NFS could not listen now, or None. Ganesha itself only says "error 98"."""
        address = self.config.bind_address
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, self.config.port))
            except OSError as error:
                return (
                    f"cannot listen on {address} port {self.config.port}: {error.strerror}"
                    " (another process, such as another NFS server, may hold it)"
                )
        return None


def _log_server_line(line: str) -> None:
    """One line of Ganesha's log as one of ours, at the level it deserves."""
    match = _LINE.fullmatch(line)
    if match is None:
        log.info("ganesha", text=line)
        return
    write = _LOUD.get(match["level"], log.info)
    chatter = match["level"] in ("EVENT", "NULL") and _CHATTER.fullmatch(match["function"])
    if chatter or match["level"] in _QUIET or _HARMLESS.search(line):
        write = log.debug
    fields = {"component": match["component"].strip(), "function": match["function"]}
    write("ganesha", text=match["text"], **fields)


def _log_bus_line(line: str) -> None:
    write = log.debug if _HARMLESS.search(line) else log.info
    write("dbus-daemon", text=line)
