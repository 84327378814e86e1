"""Measures the agent of local-volume: discovery, the cost of doing nothing, and wiping.

    hack/bench/run local-volume [--json] [--mounts N] [--devices N]
    hack/bench/run local-volume [--json] --wipe /dev/sdX     # only that; destroys what is on it

Needs root, for mounts and loop devices of its own. ``discovery_s``: from the start of the agent to
the last volume. ``steady_cpu``: of one core, and ``steady_writes``: requests that change something,
both while nothing happens. ``mount_to_pv_s``: from a new mount to its volume, the slowest of a few.
``rss_mib``: of the agent, with all volumes. ``wipe_ratio`` and ``overwrite_ratio``: how fast
``zero`` and ``overwrite:1`` are beside ``blkdiscard -z`` and ``dd oflag=direct bs=4M conv=fsync``,
in turn on one disk of a guest that can neither discard nor write zeroes by itself; above 1: faster.
They are about the writing; ``start_s`` is what a wipe of ours takes before its first byte.
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

from external_storage import Informer, PersistentVolume, StorageClass
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.types import Node
from external_storage.testing import ControlPlane, Guest
from external_storage.testing.processes import free_port
from local_volume_provisioner.names import LABEL_NODE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# As in a pod, by a token in a file: a kubeconfig is read by a package that alone takes 15 MiB.
IN_POD = """
import functools, pathlib, sys
from external_storage.kube import auth
from local_volume_provisioner.__main__ import main
directory = pathlib.Path(sys.argv.pop(1))
auth.load = functools.partial(auth.load, service_account_dir=directory)
sys.exit(main())
"""
LIMIT_S = 300.0
SETTLE_S = 15.0
STEADY_S = 30.0
LATE_MOUNTS = 5
WIPE_BYTES = 2 << 30
WIPE_LIMIT_S = 3600.0
ROUNDS = 5


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


def service_account(plane: ControlPlane, directory: Path) -> str:
    """The directory that a pod has its credentials in; all rights."""
    directory.mkdir()
    (directory / "ca.crt").write_bytes(plane.ca_file.read_bytes())
    (directory / "token").write_text(plane.service_account_token("default", "default"))
    group = "rbac.authorization.k8s.io"
    body = {
        "apiVersion": f"{group}/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "bench"},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"kind": "ServiceAccount", "namespace": "default", "name": "default"}],
    }  # fmt: skip
    plane.request("POST", f"/apis/{group}/v1/clusterrolebindings", body)
    return str(directory)


def discovery(
    plane: ControlPlane, directory: Path, *, mounts: int, devices: int
) -> dict[str, float]:
    api = Client(auth.load(kubeconfig=str(plane.kubeconfig)))
    name = f"bench-{uuid.uuid4().hex[:8]}"
    api.create(Node, {"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}})
    for suffix in ("-m", "-d"):
        body = {"metadata": {"name": name + suffix}, "provisioner": "kubernetes.io/no-provisioner"}
        api.create(StorageClass, body)

    # A watch: to list a thousand volumes again and again would be work for the API server.
    informer = Informer(api, PersistentVolume, label_selector=f"{LABEL_NODE}={name}")
    informer.start()

    def volumes() -> int:
        return len(informer.lister.all())

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
            *(sys.executable, "-c", IN_POD, service_account(plane, directory / "account")),
            *(f"--node-name={name}", f"--http-endpoint=127.0.0.1:{port}", "--log-level=warning"),
            *(f"--config-dir={config}", f"--state-dir={directory}/state"),
            f"--run-dir={directory}/run",
        ]
        server = {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(plane.port),
        }
        image = {"MALLOC_ARENA_MAX": "1"}  # as its Dockerfile has it
        with subprocess.Popen(command, env={**os.environ, **server, **image}) as agent:
            try:
                found = until(lambda: volumes() == mounts + devices, "a volume for each")
                time.sleep(SETTLE_S)
                before, (cpu, _) = writes(port), usage(agent.pid)
                time.sleep(STEADY_S)
                after, (cpu_after, size) = writes(port), usage(agent.pid)
                late = [mount_to_volume(mounted / f"late{n}", volumes) for n in range(LATE_MOUNTS)]
            finally:
                agent.terminate()
                agent.wait(60)
                for late_mount in mounted.glob("late*"):
                    subprocess.run(["umount", str(late_mount)], check=False, capture_output=True)
    informer.stop(10)
    api.close()
    return {
        "discovery_s": round(found, 2),
        "steady_cpu": round((cpu_after - cpu) / STEADY_S, 4),
        "steady_writes": after - before,
        "mount_to_pv_s": round(max(late), 2),
        "rss_mib": round(size, 1),
    }


def mount_to_volume(point: Path, volumes: Callable[[], int]) -> float:
    before = volumes()
    point.mkdir()
    sh("mount", "-t", "tmpfs", "-o", "size=16m", "none", str(point))
    return until(lambda: volumes() == before + 1, "a volume for a new mount")


def wiping() -> dict[str, float]:
    """Of a disk that can neither discard nor write zeroes by itself: all has to be written."""
    with Guest(name="bench") as guest:
        guest.install(ROOT / "lib", ROOT / "local-volume")
        disk = guest.add_disk(WIPE_BYTES, serial="bench", write_zeroes=False, discard=False)
        program = "/root/wipe.py"
        guest.put(HERE / "local_volume_wipe.py", program)
        argv = ["python3", program, guest.path(disk), str(ROUNDS)]
        took = json.loads(guest.run(argv, timeout_s=WIPE_LIMIT_S))
    return of_wipes(took)


def of_wipes(took: dict[str, list[float]]) -> dict[str, float]:
    """How fast ours is beside the usual tool; from the seconds that each took, by name."""
    seconds = {name: statistics.median(found) for name, found in took.items()}
    return {
        "wipe_ratio": round(seconds["blkdiscard"] / seconds["zero"], 3),
        "overwrite_ratio": round(seconds["dd"] / seconds["overwrite"], 3),
        **{f"{name}_s": round(found, 2) for name, found in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="hack/bench/run local-volume", description=__doc__)
    parser.add_argument("--mounts", type=int, default=1000)
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--wipe", metavar="DEVICE", help="measure wiping on it, and nothing else")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    given = parser.parse_args()
    if given.wipe:
        argv = [sys.executable, str(HERE / "local_volume_wipe.py"), given.wipe, str(ROUNDS)]
        result = of_wipes(json.loads(sh(*argv)))
    else:
        work = tempfile.TemporaryDirectory(prefix="bench-local-volume-")
        with work as name, ControlPlane() as plane:
            result = discovery(plane, Path(name), mounts=given.mounts, devices=given.devices)
        result |= wiping()
    if given.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:16} {value}")


if __name__ == "__main__":
    main()
