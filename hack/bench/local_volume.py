"""Measures the agent of local-volume: discovery, the cost of doing nothing, and wiping.

    hack/bench/run local-volume [--json] [--mounts N] [--devices N]
    hack/bench/run local-volume [--json] --wipe /dev/sdX     # destroys what is on it

Needs root, for mounts and loop devices of its own. ``wipe_ratio`` and ``overwrite_ratio`` compare
with ``blkdiscard -z`` and ``dd oflag=direct bs=4M conv=fsync`` on the same device; above 1 is
faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from external_storage import PersistentVolume, StorageClass
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.types import Node
from external_storage.testing import ControlPlane
from external_storage.testing.processes import free_port
from local_volume_provisioner.cleaning.machine import Cleaner, Limits
from local_volume_provisioner.config import ClassConfig, VolumeMode
from local_volume_provisioner.ledger import Ledger
from local_volume_provisioner.methods import Method
from local_volume_provisioner.mounts import MountTable
from local_volume_provisioner.names import LABEL_NODE
from local_volume_provisioner.scan import Candidate, Scanner

LIMIT_S = 300.0
SETTLE_S = 15.0
STEADY_S = 20.0
ROUNDS = 3


def sh(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def until(met: Callable[[], bool], what: str) -> float:
    """Seconds until it was so."""
    started = time.monotonic()
    while not met():
        if time.monotonic() - started > LIMIT_S:
            sys.exit(f"not within {LIMIT_S:.0f} s: {what}")
        time.sleep(0.02)
    return time.monotonic() - started


@contextmanager
def disks(directory: Path, *, mounts: int, devices: int) -> Iterator[tuple[Path, Path]]:
    """Two directories: of tmpfs mounts, and of links to loop devices."""
    mounted, linked = directory / "mounts", directory / "devices"
    mounted.mkdir()
    linked.mkdir()
    with ExitStack() as stack:
        for number in range(mounts):
            (mounted / f"m{number}").mkdir()
            sh("mount", "-t", "tmpfs", "-o", "size=16m", "none", str(mounted / f"m{number}"))
            stack.callback(sh, "umount", str(mounted / f"m{number}"))
        for number in range(devices):
            image = directory / f"{number}.img"
            with image.open("wb") as file:
                file.truncate(16 << 20)
            loop = sh("losetup", "--find", "--show", str(image))
            stack.callback(sh, "losetup", "--detach", loop)
            (linked / f"d{number}").symlink_to(loop)
        yield mounted, linked


def usage(pid: int) -> tuple[float, float]:
    """CPU seconds so far, and MiB now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    status = Path(f"/proc/{pid}/status").read_text()
    size = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return cpu, int(size.split()[1]) / 1024


def writes(port: int) -> float:
    """Requests of the agent that change something, so far."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    verbs = ("create", "patch", "delete")
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("external_storage_api_requests_total") and any(v in line for v in verbs)
    )


def discovery(
    plane: ControlPlane, directory: Path, *, mounts: int, devices: int
) -> dict[str, float]:
    api = Client(auth.load(kubeconfig=str(plane.kubeconfig)))
    name = f"bench-{uuid.uuid4().hex[:8]}"
    api.create(Node, {"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}})
    for suffix in ("-m", "-d"):
        body = {"metadata": {"name": name + suffix}, "provisioner": "kubernetes.io/no-provisioner"}
        api.create(StorageClass, body)

    def volumes() -> int:
        return len(api.list_all(PersistentVolume, label_selector=f"{LABEL_NODE}={name}"))

    with disks(directory, mounts=mounts, devices=devices) as (mounted, linked):
        config = directory / "config"
        config.mkdir()
        classes = {
            f"{name}-m": {"hostDir": str(mounted), "mountDir": str(mounted)},
            f"{name}-d": {"hostDir": str(linked), "mountDir": str(linked), "volumeMode": "Block"},
        }
        (config / "storageClassMap").write_text(json.dumps(classes))
        port = free_port()
        command = [
            *(sys.executable, "-m", "local_volume_provisioner", f"--node-name={name}"),
            *(f"--config-dir={config}", f"--state-dir={directory}/state", "--log-level=warning"),
            *(f"--run-dir={directory}/run", f"--http-endpoint=127.0.0.1:{port}"),
            f"--kubeconfig={plane.kubeconfig}",
        ]
        with subprocess.Popen(command) as agent:
            try:
                found = until(lambda: volumes() == mounts + devices, "a volume for each")
                time.sleep(SETTLE_S)
                before, (cpu, _) = writes(port), usage(agent.pid)
                time.sleep(STEADY_S)
                after, (cpu_after, size) = writes(port), usage(agent.pid)
                (mounted / "late").mkdir()
                sh("mount", "-t", "tmpfs", "none", str(mounted / "late"))
                late = until(lambda: volumes() == mounts + devices + 1, "a volume for a new mount")
            finally:
                agent.terminate()
                agent.wait(60)
                subprocess.run(["umount", str(mounted / "late")], check=False, capture_output=True)
    api.close()
    return {
        "discovery_s": round(found, 2),
        "steady_cpu": round((cpu_after - cpu) / STEADY_S, 4),
        "steady_writes": after - before,
        "mount_to_pv_s": round(late, 2),
        "rss_mib": round(size, 1),
    }


def wiping(device: str, directory: Path) -> dict[str, float]:
    """Ours against the usual tools, in turn on the same device."""
    entries = directory / "wipe"
    entries.mkdir()
    (entries / "disk").symlink_to(device)
    ledger = Ledger(directory / "wipe-state")
    cleaner = Cleaner(ledger, Limits(step_s=3600, command_s=3600), str(directory / "run"))

    def ours(method: str) -> float:
        config = ClassConfig(
            name="c", host_dir=str(entries), mount_dir=str(entries), mode=VolumeMode.BLOCK,
            method=Method.parse(method),
        )  # fmt: skip
        found = Scanner().look(config, "disk", MountTable.read())
        if not isinstance(found, Candidate):
            sys.exit(f"{device}: {found.text}")
        started = time.monotonic()
        cleaner.clean(found, config, uid="u", wanted=lambda: True)
        return time.monotonic() - started

    def theirs(*argv: str) -> float:
        started = time.monotonic()
        # dd ends with an error, at the end of the device.
        subprocess.run(argv, check=False, capture_output=True)
        return time.monotonic() - started

    dd = ("dd", "if=/dev/zero", f"of={device}", "bs=4M", "oflag=direct", "conv=fsync")
    ratios: dict[str, list[float]] = {"wipe_ratio": [], "overwrite_ratio": []}
    for _ in range(ROUNDS):
        ratios["wipe_ratio"].append(theirs("blkdiscard", "-z", "-f", device) / ours("zero"))
        ratios["overwrite_ratio"].append(theirs(*dd) / ours("overwrite:1"))
    ledger.close()
    return {name: round(statistics.median(found), 3) for name, found in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="hack/bench/run local-volume", description=__doc__)
    parser.add_argument("--mounts", type=int, default=1000)
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--wipe", metavar="DEVICE", help="measure wiping on it, and nothing else")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-local-volume-") as name:
        if given.wipe:
            result = wiping(given.wipe, Path(name))
        else:
            with ControlPlane() as plane:
                result = discovery(plane, Path(name), mounts=given.mounts, devices=given.devices)
    if given.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:16} {value}")


if __name__ == "__main__":
    main()
