"""What NFS-Ganesha and its private D-Bus are told: one frozen description, rendered to two files.

NFSv4 only, so that one TCP port is all there is: no rpcbind, statd, mountd, lock manager or
rquota. Client state is recovered from ``<state_dir>/recovery``; the exports are read from
``<state_dir>/exports.d``, one file each, so that a server that starts has all of them before its
first client comes back.

Source: the option tables of NFS-Ganesha V4.3 (ganesha-core-config.8) and dbus-daemon(1).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from external_storage import replace_file

LOG_LEVELS = ("FATAL", "MAJ", "CRIT", "WARN", "EVENT", "INFO", "DEBUG", "FULL_DEBUG")

_MAX_SOCKET_PATH = 107  # sockaddr_un.sun_path is 108 bytes with its terminating NUL
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class GaneshaConfig:
    """Where one NFS-Ganesha keeps its things and how it serves. ``validate()`` before use."""

    state_dir: Path
    """Persistent directory on the exported file system, outside every exported directory."""

    run_dir: Path
    """Directory of sockets, pid file and rendered configuration; need not outlive the process.
    Short, because the path of a unix socket holds 107 bytes."""

    port: int = 2049
    """TCP port of NFS."""

    bind_address: str = "0.0.0.0"
    """Address NFS listens on."""

    grace_period_s: int = 90
    """Seconds, 0 to 180: how long known clients may reclaim their locks and open files after a
    start, during which nobody gets new ones. Ends early once all of them have."""

    lease_lifetime_s: int = 60
    """Seconds, 1 to 120: how long a silent client keeps its state."""

    log_level: str = "EVENT"
    """Ganesha's own level, one of ``LOG_LEVELS``."""

    @property
    def exports_dir(self) -> Path:
        """The export files Ganesha reads when it starts."""
        return self.state_dir / "exports.d"

    @property
    def recovery_dir(self) -> Path:
        """Ganesha's record of its clients; losing it makes clients lose their locks."""
        return self.state_dir / "recovery"

    @property
    def config_file(self) -> Path:
        return self.run_dir / "ganesha.conf"

    @property
    def pid_file(self) -> Path:
        return self.run_dir / "ganesha.pid"

    @property
    def bus_config_file(self) -> Path:
        return self.run_dir / "dbus.conf"

    @property
    def bus_socket(self) -> Path:
        """Where dbus-daemon listens: for us, and for an admin's ``ganesha_mgr`` or ``gdbus``."""
        return self.run_dir / "bus"

    @property
    def relay_socket(self) -> Path:
        """What Ganesha takes for its bus; see ``bus_relay``."""
        return self.run_dir / "bus-relay"

    @property
    def bus_address(self) -> str:
        """The D-Bus address of the private bus."""
        return f"unix:path={self.bus_socket}"

    @property
    def relay_address(self) -> str:
        """The D-Bus address Ganesha is given."""
        return f"unix:path={self.relay_socket}"

    def validate(self) -> None:
        """Raise ValueError with every problem found, one a line."""
        if problems := self._problems():
            raise ValueError("\n".join(problems))

    def _problems(self) -> list[str]:
        problems = [
            f"{name} must be an absolute path of letters, digits and ._-/ only: {path}"
            for name, path in (("state_dir", self.state_dir), ("run_dir", self.run_dir))
            if not _PLAIN_PATH.fullmatch(str(path))
        ]
        longest = len(str(self.relay_socket).encode())
        if longest > _MAX_SOCKET_PATH:
            problems.append(
                f"run_dir is too long by {longest - _MAX_SOCKET_PATH} bytes: the socket"
                f" {self.relay_socket} would have {longest} bytes, the limit is {_MAX_SOCKET_PATH}"
            )
        problems += [
            f"{name} must be {low} to {high}, not {value}"
            for name, value, low, high in (
                ("port", self.port, 1, 65535),
                ("grace_period_s", self.grace_period_s, 0, 180),
                ("lease_lifetime_s", self.lease_lifetime_s, 1, 120),
            )
            if not low <= value <= high
        ]
        if not re.fullmatch(r"[0-9A-Fa-f.:]+", self.bind_address):
            problems.append(f"bind_address must be an IP address, not {self.bind_address!r}")
        if self.log_level not in LOG_LEVELS:
            problems.append(f"log_level must be one of {', '.join(LOG_LEVELS)}")
        return problems

    def write(self) -> None:
        """Make the directories and write both files, each replaced at once.

        Raises ValueError as ``validate()`` does, and OSError.
        """
        self.validate()
        self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_shared(self.run_dir)
        self.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in (self.exports_dir, self.recovery_dir):
            directory.mkdir(mode=0o700, exist_ok=True)
        replace_file(self.config_file, render_ganesha(self))
        replace_file(self.bus_config_file, render_bus(self))


def _refuse_shared(directory: Path) -> None:
    """What is run from here is run as root: nobody else may be able to change it."""
    found = directory.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ValueError(f"run_dir {directory} must be ours, and writable by nobody else")


def render_ganesha(config: GaneshaConfig) -> str:
    """The text of ganesha.conf.

    Access is closed by default (Ganesha's own default for Access_Type is None, too): each export
    file opens its own volume. The heartbeat signal is off because nobody listens to it.
    """
    return f"""\
# Written by nfs-provisioner at each start; changes here are lost.
NFS_CORE_PARAM {{
    Protocols = 4;
    NFS_Port = {config.port};
    Bind_addr = {config.bind_address};
    Enable_NLM = false;
    Enable_RQUOTA = false;
    Enable_UDP = false;
    Heartbeat_Freq = 0;
}}
NFS_KRB5 {{ Active_krb5 = false; CCacheDir = "{config.run_dir}/krb5"; }}
NFSv4 {{
    # Graceless would make clients lose their locks at each restart, and with them get EIO.
    Graceless = false;
    Grace_Period = {config.grace_period_s};
    Lease_Lifetime = {config.lease_lifetime_s};
    RecoveryBackend = fs_ng;
    RecoveryRoot = "{config.recovery_dir}";
    Only_Numeric_Owners = true;
}}
EXPORT_DEFAULTS {{ Access_Type = None; SecType = sys; Protocols = 4; Transports = TCP; }}
LOG {{ Default_Log_Level = {config.log_level}; }}
%dir "{config.exports_dir}"
"""


def render_bus(config: GaneshaConfig) -> str:
    """The text of the private bus's configuration.

    The policy is here in full, so that nothing hangs on files a distribution ships. It lets in
    root alone, and root may do everything.
    """
    return f"""\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<!-- Written by nfs-provisioner at each start; changes here are lost. -->
<busconfig>
  <listen>{config.bus_address}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <deny user="*"/>
    <allow user="0"/>
    <allow own="org.ganesha.nfsd"/>
    <allow send_destination="*" eavesdrop="false"/>
    <allow receive_sender="*" eavesdrop="false"/>
  </policy>
</busconfig>
"""
