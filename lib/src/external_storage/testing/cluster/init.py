"""The first process of a cluster's namespaces: makes the node's place, then reaps what is orphaned.

Run by its path, with the directory it works in as the only argument; standard library only. When it
ends, the kernel ends every process of the cluster with it, and with them mounts and interfaces.

What the node takes for granted has a private copy: ``/sys``, ``/run``, ``/var/log``, and what lies
under ``/etc`` and ``/var/lib``. ``/srv`` and ``/mnt`` are empty and private; all else is the
machine's.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_KEPT = {
    "kubelet": "/var/lib/kubelet",
    "containerd": "/var/lib/containerd",
    "cni": "/var/lib/cni",
    "log": "/var/log",
    "srv": "/srv",
    "mnt": "/mnt",
}


def main(directory: Path) -> None:
    """Never returns; ``directory`` has the file ``init.json`` that says what is wanted."""
    spec = json.loads((directory / "init.json").read_bytes())
    socket.sethostname(spec["node"])
    own_sys(directory / "cgroup")
    run("mount", "--make-rshared", "/")
    hosts = Path("/etc/hosts").read_text(encoding="utf-8", errors="replace")
    own_trees(directory / "overlay", Path(spec["state"]))
    write_files({**spec["files"], "/etc/hosts": hosts + spec["hosts"]})
    run("ip", "-batch", "-", input="\n".join(spec["links"]))
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1", encoding="ascii")
    # The kernel reaps orphans by itself then.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    (directory / "init.ready").touch()
    while True:
        signal.pause()


def own_sys(place: Path) -> None:
    """A /sys that shows this network namespace, with the machine's cgroups in it as before."""
    # By moves, which keep the mounts as they are; so this comes before any mount is shared.
    place.mkdir(exist_ok=True)
    run("mount", "--move", "/sys/fs/cgroup", str(place))
    run("mount", "-t", "sysfs", "sysfs", "/sys")
    run("mount", "--move", str(place), "/sys/fs/cgroup")


def own_trees(scratch: Path, state: Path) -> None:
    """Private copies of what is written to; what is to outlive us is below ``state``."""
    scratch.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", "mode=700", "scratch", str(scratch))
    for lower in ("/etc", "/var/lib"):
        # An overlay, for mount points that the machine itself lacks; nothing else is written to it.
        upper, work = (scratch / f"{lower.replace('/', '-')}{kind}" for kind in ("", "-work"))
        for path in (upper, work):
            path.mkdir(mode=0o755)
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        run("mount", "-t", "overlay", "-o", options, "overlay", lower)
    for name, target in _KEPT.items():
        (state / name).mkdir(parents=True, exist_ok=True)
        if target.startswith("/var/lib/"):
            Path(target).mkdir(exist_ok=True)
        if Path(target).is_dir():
            run("mount", "--bind", str(state / name), target)
    run("mount", "-t", "tmpfs", "-o", "mode=755", "run", "/run")
    Path("/run/lock").mkdir()


def write_files(files: Mapping[str, str]) -> None:
    """Write each path anew; a link in its place is replaced, not followed."""
    for name, text in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")


def run(*argv: str, input: str | None = None) -> None:
    """Run a program; ends this process, and so the start, with its words when it fails."""
    done = subprocess.run(argv, input=input, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(argv)}: {done.stderr.strip()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
