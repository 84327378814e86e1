"""Removes what a cluster leaves on the machine, however its owner ends.

Run by its path, outside of the namespaces and in a session of its own; standard library only.
Arguments: the cluster's working directory, the name of its cgroups, the directory of its state. On
standard input come the process ids of the namespaces, one a line; its end means that the owner has
stopped, or is dead. Then the processes are killed, and loop devices, cgroups and the working
directory are removed.

The names of what could not be removed go to standard error; exit code 1 then.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_LIMIT_S = 30.0
_POLL_S = 0.02


def main(directory: Path, cgroup: str, state: Path) -> int:
    """Exit code 0 when nothing is left."""
    owned = []
    for line in sys.stdin:
        # A descriptor at once: the number could be another process's by the time it is used.
        with contextlib.suppress(ProcessLookupError):
            owned.append(os.pidfd_open(int(line)))
    for descriptor in owned:
        kill(descriptor)
    for path in {directory, state}:
        detach_loops(path)
    left = [str(path) for path in cgroup_directories(cgroup) if not remove_cgroup(path)]
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        left.append(str(directory))
    if left:
        print(f"left behind: {', '.join(left)}", file=sys.stderr)
    return 1 if left else 0


def kill(descriptor: int) -> None:
    """SIGKILL to a process, and wait for its end; of a namespace's first one: for that of all."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    select.select([descriptor], [], [], _LIMIT_S)


def cgroup_directories(name: str) -> list[Path]:
    """The cgroups of that name, in every hierarchy that the machine has."""
    root = Path("/sys/fs/cgroup")
    roots = [root] if (root / "cgroup.controllers").exists() else list(root.iterdir())
    return [path / name for path in roots if (path / name).is_dir()]


def remove_cgroup(top: Path) -> bool:
    """Remove a cgroup and those below it; whether it is gone."""
    deadline = time.monotonic() + _LIMIT_S
    while top.exists() and time.monotonic() < deadline:
        for path, _, _ in os.walk(top, topdown=False):
            # Busy for a moment after the last process has ended.
            with contextlib.suppress(OSError):
                Path(path).rmdir()
        if top.exists():
            time.sleep(_POLL_S)
    return not top.exists()


def detach_loops(directory: Path) -> None:
    """Detach the loop devices whose file is below ``directory``, as a power cut would.

    They are known by the file's inode and name: the path they show is one that a pod has seen, and
    the device may be an overlay's.
    """
    argv = ["losetup", "--json", "--list", "--output", "NAME,BACK-INO,BACK-FILE"]
    said = subprocess.run(argv, capture_output=True, check=False).stdout
    loops = {
        (int(loop["back-ino"]), Path(loop["back-file"]).name): loop["name"]
        for loop in json.loads(said or b"{}").get("loopdevices", [])
        if loop["back-ino"] and loop["back-file"]
    }
    for path, _, names in os.walk(directory) if loops else ():
        for name in names:
            with contextlib.suppress(OSError):
                loop = loops.get((os.lstat(f"{path}/{name}").st_ino, name))
                if loop is not None:
                    subprocess.run(["losetup", "--detach", loop], check=False)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
