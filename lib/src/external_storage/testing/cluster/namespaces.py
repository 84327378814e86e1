"""A node's place on this machine: its namespaces and cgroups, made and taken away."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from external_storage.testing.cluster import layout
from external_storage.testing.cluster.janitor import (
    cgroup_directories,
    detach_loops,
    remove_cgroup,
)
from external_storage.testing.cluster.requirements import ClusterError
from external_storage.testing.processes import Process, ProcessGroup, children

_SCRIPTS: Final = Path(__file__).parent
_UNSHARE: Final = (
    *("unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--mount-proc"),
    *("--fork", "--kill-child=SIGKILL"),
)
_CGROUPS: Final = Path("/sys/fs/cgroup")
_CONTROLLERS: Final = ("cpu", "cpuset", "io", "memory", "pids")
_LIMIT_S: Final = 60.0
_POLL_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class _Entered:
    """The namespaces that are there now."""

    holder: Process
    """``unshare``: when it dies, the first process dies with it."""
    first: int
    """Process id of the first process in them, as this machine counts."""


class Namespaces:
    """The namespaces of one cluster, which may be left and made anew with the same state.

    ``close()`` removes all of it. When this process is killed instead, the kernel kills the cluster
    and the janitor, a process that waits for this one's end, removes what is left.
    """

    def __init__(self, directory: Path, state: Path) -> None:
        """``directory`` is removed in the end, and its name is the cgroups'; ``state`` is kept."""
        self._directory = directory
        self._state = state
        self._outside = ProcessGroup(directory)
        self._entered: _Entered | None = None
        script = str(_SCRIPTS / "janitor.py")
        self._janitor = subprocess.Popen(
            [sys.executable, "-I", script, str(directory), self.cgroup, str(state)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    @property
    def cgroup(self) -> str:
        """The name of the cgroups, directly below the root of each hierarchy."""
        return self._directory.name

    @property
    def prefix(self) -> list[str]:
        """What runs a program in the namespaces, in our directory, when it is put before it.

        The program dies with the process that this becomes.
        """
        enter = ["nsenter", "--target", str(self.first_process), "--all"]
        there = ["env", f"--chdir={self._directory}"]
        return [*enter, "--", *there, "setpriv", "--pdeathsig", "KILL", "--"]

    @property
    def first_process(self) -> int:
        """Process id of the first process in them, as this machine counts."""
        if self._entered is None:
            raise ClusterError("the cluster is not running")
        return self._entered.first

    @property
    def network_prefix(self) -> list[str]:
        """As ``prefix``, for a program that shares but the network; it becomes the program."""
        return ["nsenter", "--target", str(self.first_process), "--net", "--"]

    def enter(self, files: Mapping[str, str]) -> None:
        """Make the namespaces; ``files``: contents of files that only they see, by their paths.

        Raises ``ClusterError`` with the words of the step that failed.
        """
        for path in _hierarchies():
            _make_cgroup(path, self.cgroup)
        ready = self._directory / "init.ready"
        ready.unlink(missing_ok=True)
        spec = {
            "node": layout.NODE,
            "state": str(self._state),
            "files": dict(files),
            "hosts": _HOSTS,
            "links": _LINKS,
        }
        (self._directory / "init.json").write_text(json.dumps(spec), encoding="utf-8")
        init = [sys.executable, "-I", str(_SCRIPTS / "init.py"), str(self._directory)]
        holder = self._outside.start("namespaces", [*_UNSHARE, *init])
        deadline = time.monotonic() + _LIMIT_S
        while not ready.exists():
            if holder.exit_code is not None:
                raise ClusterError(f"the namespaces could not be made: {holder.tail()}")
            if time.monotonic() > deadline:
                raise ClusterError(f"no namespaces after {_LIMIT_S:.0f} s: {holder.tail()}")
            time.sleep(_POLL_S)
        self._entered = _Entered(holder, children(holder.pid)[0])
        for pid in (holder.pid, self._entered.first):
            print(pid, file=self._janitor.stdin, flush=True)

    def leave(self) -> None:
        """End every process in the namespaces at once, as when a machine loses power."""
        if self._entered is not None:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(self._entered.first)
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                # The kernel ends it last: then nothing of the cluster runs or has a file open.
                select.select([descriptor], [], [], _LIMIT_S)
                os.close(descriptor)
        self._entered = None
        self._outside.kill_all()
        # A machine that starts has neither, and a kubelet looks into old cgroups for 12 seconds.
        detach_loops(self._state)
        for path in cgroup_directories(self.cgroup):
            remove_cgroup(path)

    def close(self) -> None:
        """End it and remove everything; ``ClusterError`` names what could not be removed."""
        self.leave()
        _, words = self._janitor.communicate()
        if self._janitor.returncode != 0:
            raise ClusterError(f"cleaning up: {words.strip()}")


_HOSTS: Final = f"\n{layout.NODE_ADDRESS} {layout.NODE}\n{layout.API_SERVICE} " + " ".join(
    ("kubernetes.default.svc.cluster.local", "kubernetes.default.svc", "kubernetes.default")
)
_LINKS: Final[Sequence[str]] = (
    "link set lo up",
    f"link add {layout.BRIDGE} type bridge",
    # A bridge without a port that is up has no carrier; and not every kernel has dummy links.
    "link add port0 type veth peer name port1",
    f"link set port0 master {layout.BRIDGE} up",
    "link set port1 up",
    f"addr add {layout.NODE_ADDRESS}/24 dev {layout.BRIDGE}",
    f"addr add {layout.API_SERVICE}/32 dev {layout.BRIDGE}",
    f"link set {layout.BRIDGE} up",
    # Nothing lies behind it: it makes every address one that can be dialled, and so redirected.
    f"route add default dev {layout.BRIDGE}",
    f"route add {layout.GUEST_PODS} via {layout.GUEST_ADDRESS}",
)


def _hierarchies() -> list[Path]:
    if (_CGROUPS / "cgroup.controllers").exists():
        return [_CGROUPS]
    return [path for path in _CGROUPS.iterdir() if (path / "cgroup.procs").exists()]


def _make_cgroup(hierarchy: Path, name: str) -> None:
    made = hierarchy / name
    try:
        made.mkdir(exist_ok=True)
    except OSError as error:
        raise ClusterError(f"cannot make a cgroup: {error}") from None
    for file in ("cpuset.cpus", "cpuset.mems"):
        # Version 1: a new one has none, and takes no process then.
        if (hierarchy / file).exists() and (hierarchy / "cpuset.cpu_exclusive").exists():
            (made / file).write_bytes((hierarchy / file).read_bytes())
    if (hierarchy / "cgroup.controllers").exists():
        for controller, path in ((c, p) for p in (hierarchy, made) for c in _CONTROLLERS):
            # Of some there is none here, or it is a version 1 hierarchy's.
            with contextlib.suppress(OSError):
                (path / "cgroup.subtree_control").write_text(f"+{controller}", encoding="ascii")
