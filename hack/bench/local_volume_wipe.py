"""Times wipes of a device by the agent's cleaner and by the usual tools, in turn.

    python local_volume_wipe.py DEVICE [ROUNDS]        # destroys what is on it

``local_volume.py`` runs it in a guest. Prints one line of JSON: the seconds each took, by name.
Ours are counted from the first byte, as with a tool that is there at once; ``start`` is what comes
before that, the start of a process and its checks, the same for a disk of any size.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from local_volume_provisioner.cleaning.machine import Cleaner, Limits
from local_volume_provisioner.config import ClassConfig, VolumeMode
from local_volume_provisioner.ledger import Ledger
from local_volume_provisioner.methods import Method
from local_volume_provisioner.mounts import MountTable
from local_volume_provisioner.scan import Candidate, Scanner

BLOCK = 4 << 20


class Device:
    """One device, which nobody uses."""

    def __init__(self, path: str, directory: Path) -> None:
        self.path = path
        self._entries = directory / "entries"
        self._entries.mkdir()
        (self._entries / "disk").symlink_to(path)
        limits = Limits(step_s=3600, command_s=3600)
        self._cleaner = Cleaner(Ledger(directory / "state"), limits, str(directory / "run"))

    def clean(self, method: str) -> tuple[float, float]:
        """All that the agent does, but for the API server's part: seconds until the first byte is
        about to be written, and from then on."""
        config = ClassConfig(
            name="c", host_dir=str(self._entries), mount_dir=str(self._entries),
            mode=VolumeMode.BLOCK, method=Method.parse(method),
        )  # fmt: skip
        found = Scanner().look(config, "disk", MountTable.read())
        if not isinstance(found, Candidate):
            sys.exit(f"{self.path}: {found.text}")
        steps: list[float] = []

        def wanted() -> bool:  # is asked before each step
            steps.append(time.monotonic())
            return True

        began = time.monotonic()
        self._cleaner.clean(found, config, uid="u", wanted=wanted)
        return steps[0] - began, time.monotonic() - steps[0]

    def run(self, *argv: str) -> tuple[float, float]:
        began = time.monotonic()
        subprocess.run(argv, check=True, capture_output=True)
        return 0.0, time.monotonic() - began


def main() -> None:
    path, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory(prefix="bench-wipe-") as name:
        device = Device(path, Path(name))
        size = int(subprocess.check_output(["blockdev", "--getsize64", path]))
        # Of as many blocks as there are: at the end of a device it would fail, and not sync.
        blocks = ("bs=4M", f"count={size // BLOCK}", "oflag=direct", "conv=fsync")
        works: dict[str, Callable[[], tuple[float, float]]] = {
            "blkdiscard": lambda: device.run("blkdiscard", "-z", "-f", path),
            "zero": lambda: device.clean("zero"),
            "dd": lambda: device.run("dd", "if=/dev/zero", f"of={path}", *blocks),
            "overwrite": lambda: device.clean("overwrite:1"),
        }
        # The first pass over a new disk is the host's that finds room for it.
        works["dd"]()
        took: dict[str, list[float]] = {name: [] for name in (*works, "start")}
        for number in range(rounds):
            # In both orders, so that neither of two is always the one that comes after a pause.
            for name in works if number % 2 else reversed(works):
                start, wipe = works[name]()
                took[name].append(round(wipe, 3))
                took["start"] += [round(start, 3)] if start else []
    print(json.dumps(took))


if __name__ == "__main__":
    main()
