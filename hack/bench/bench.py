"""Measures the library beside the Go library, on one control plane, in the same minutes.

What counts are the ratios: the machine, its load and the API server are the same for both. Speed
is never tested elsewhere in this repository.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from external_storage import PersistentVolume, PersistentVolumeClaim, StorageClass
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.types import KubeObject
from external_storage.testing import ControlPlane

HERE = Path(__file__).resolve().parent
NULL = [sys.executable, str(HERE / "null.py"), "--leader-elect=false", "--log-level=warning"]
LIMIT_S = 600.0
HANGING = 20


class Namespace(KubeObject, frozen=True):
    API_VERSION = "v1"
    KIND = "Namespace"
    RESOURCE = "namespaces"


@dataclass(frozen=True, slots=True)
class Result:
    """One run; seconds, CPU seconds, MiB."""

    bound_s: float
    deleted_s: float
    cpu_s: float
    peak_mib: float


class Load:
    """Claims of classes of this run's own."""

    def __init__(self, api: Client) -> None:
        self._api = api
        self.name = f"bench-{uuid.uuid4().hex[:6]}"
        self._pool = ThreadPoolExecutor(16)
        api.create(Namespace, {"metadata": {"name": self.name}})

    def add_class(self, name: str, parameters: Mapping[str, str] | None = None) -> str:
        name = f"{self.name}-{name}"
        body = {"metadata": {"name": name}, "provisioner": "bench/null"}
        self._api.create(StorageClass, {**body, "parameters": dict(parameters or {})})
        return name

    def create(self, class_name: str, count: int) -> None:
        def one(number: int) -> None:
            spec = {
                "accessModes": ["ReadWriteMany"],
                "storageClassName": class_name,
                "resources": {"requests": {"storage": "1Gi"}},
            }
            body = {"metadata": {"name": f"{class_name}-{number}"}, "spec": spec}
            self._api.create(PersistentVolumeClaim, body, namespace=self.name)

        list(self._pool.map(one, range(count)))

    def claims(self) -> list[PersistentVolumeClaim]:
        return self._api.list_all(PersistentVolumeClaim, namespace=self.name)

    def bound(self, class_name: str) -> int:
        return sum(
            claim.status.phase == "Bound" and claim.spec.storage_class_name == class_name
            for claim in self.claims()
        )

    def volumes(self) -> int:
        found = self._api.list_all(PersistentVolume)
        return sum(volume.spec.storage_class_name.startswith(self.name) for volume in found)

    def delete_claims(self) -> None:
        def one(claim: PersistentVolumeClaim) -> None:
            self._api.delete(PersistentVolumeClaim, claim.name, uid=claim.uid, namespace=self.name)

        list(self._pool.map(one, self.claims()))

    def close(self) -> None:
        self._pool.shutdown()
        for kind in (StorageClass, Namespace):
            for found in self._api.list_all(kind):
                if found.name.startswith(self.name):
                    self._api.delete(kind, found.name, uid=found.uid)


def until(met: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not met():
        if time.monotonic() > deadline:
            sys.exit(f"not within {LIMIT_S:.0f} s: {what}")
        time.sleep(0.1)


@contextmanager
def running(command: Sequence[str], kubeconfig: Path, log: Path) -> Iterator[int]:
    """A provisioner's process; its pid."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            list(command),
            stdout=out,
            stderr=out,
            env={**os.environ, "KUBECONFIG": str(kubeconfig)},
        )
        try:
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def usage(pid: int) -> tuple[float, float]:
    """CPU seconds so far and peak MiB, as the kernel accounts them."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    status = Path(f"/proc/{pid}/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return cpu, int(peak.split()[1]) / 1024


def measure(api: Client, plane: ControlPlane, command: Sequence[str], claims: int) -> Result:
    """Make and delete claims while ``command`` runs; its start-up is part of its CPU time."""
    load = Load(api)
    log = plane.kubeconfig.parent / f"{load.name}.log"
    with running(command, plane.kubeconfig, log) as pid:
        time.sleep(4)
        class_name = load.add_class("standard")
        started = time.monotonic()
        load.create(class_name, claims)
        until(lambda: load.bound(class_name) == claims, f"{claims} claims Bound")
        bound = time.monotonic() - started
        started = time.monotonic()
        load.delete_claims()
        until(lambda: load.volumes() == 0, "all volumes gone")
        deleted = time.monotonic() - started
        cpu, peak = usage(pid)
    load.close()
    return Result(round(bound, 2), round(deleted, 2), round(cpu, 2), round(peak, 1))


def rate_beside(api: Client, plane: ControlPlane, claims: int, *, hanging: int) -> float:
    """Claims Bound a second while ``hanging`` claims of another class hang in their back end."""
    load = Load(api)
    log = plane.kubeconfig.parent / f"{load.name}.log"
    with running([*NULL, "--timeout=1h"], plane.kubeconfig, log):
        time.sleep(4)
        slow, quick = load.add_class("slow", {"hang": "true"}), load.add_class("quick")
        load.create(slow, hanging)
        time.sleep(2)
        started = time.monotonic()
        load.create(quick, claims)
        until(lambda: load.bound(quick) == claims, f"{claims} claims Bound")
        seconds = time.monotonic() - started
        load.delete_claims()
        until(lambda: load.volumes() == 0, "all volumes gone")
    load.close()
    return claims / seconds


def compare(api: Client, plane: ControlPlane, peer: Path, *, claims: int, rounds: int) -> None:
    # Its default limit of five requests a second would be all there is to see.
    commands = {
        "external-storage": NULL,
        "go, no limit": [str(peer), "-qps", "10000", "-burst", "10000"],
    }
    results: dict[str, list[Result]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            results[name].append(measure(api, plane, command, claims))
            print(json.dumps({"run": name, **asdict(results[name][-1])}), flush=True)
    ours, theirs = results["external-storage"], results["go, no limit"]
    for field in ("bound_s", "deleted_s", "cpu_s", "peak_mib"):
        a, b = (statistics.median(getattr(r, field) for r in rs) for rs in (ours, theirs))
        print(f"{field}: {a:g} against {b:g} of the Go library without limit: ratio {a / b:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--claims", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="the built peer-go; without it no comparison")
    parser.add_argument("--fairness", action="store_true", help="a class that hangs beside another")
    given = parser.parse_args()
    with ControlPlane() as plane:
        api = Client(auth.load(kubeconfig=str(plane.kubeconfig)))
        if given.peer is not None:
            compare(api, plane, given.peer, claims=given.claims, rounds=given.rounds)
        if given.fairness:
            alone, beside = [], []
            for _ in range(given.rounds):
                alone.append(rate_beside(api, plane, given.claims, hanging=0))
                beside.append(rate_beside(api, plane, given.claims, hanging=HANGING))
            a, b = statistics.median(alone), statistics.median(beside)
            print(f"claims/s alone {a:.1f}, beside {HANGING} that hang {b:.1f}: ratio {b / a:.2f}")
        api.close()


if __name__ == "__main__":
    main()
