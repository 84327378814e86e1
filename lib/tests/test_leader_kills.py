"""The leader is killed again and again amid its work; at the end all is there, and once."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from external_storage import PersistentVolumeClaim
from external_storage.testing.processes import die_with_parent, free_port, log_tail

Until = Callable[..., Any]

PROGRAM = Path(__file__).parent / "programs" / "folders.py"
# In full: 500 claims, and a kill every 5 s for a minute and until all are Bound.
IN_FULL = bool(os.environ.get("LEADER_KILLS_IN_FULL"))
CLAIMS = 500 if IN_FULL else 100
KILL_EVERY_S = 5.0
KILL_FOR_S = 60.0
# Else at so many Bound claims, by the work's progress: none of them late, none of them idle.
KILLS_AT = (15, 45, 75)


@dataclass
class Replica:
    """A place for a provisioner's process: when one is killed, another one takes it."""

    flags: dict[str, object]
    log: Path
    _port: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        self._port = free_port()
        flags = {**self.flags, "http-endpoint": f"127.0.0.1:{self._port}"}
        program = [sys.executable, str(PROGRAM), *(f"--{k}={v}" for k, v in flags.items())]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                die_with_parent(program), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def leads(self) -> bool:
        """Whether its metrics say so; one that is starting cannot be asked yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        with suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/metrics")
            return b"\nexternal_storage_leader 1.0" in connection.getresponse().read()
        return False


@dataclass
class Show:
    """Two replicas, their claims, and what has become of them."""

    rig: Any
    replicas: tuple[Replica, Replica]

    def bound(self) -> int:
        claims = self.rig.api.list_all(PersistentVolumeClaim, namespace=self.rig.namespace)
        return sum(claim.status.phase == "Bound" for claim in claims)

    def kill_the_leader(self) -> bool:
        """And start another in its place at once; False when nobody leads at this moment."""
        for replica in self.replicas:
            if replica.leads():
                replica.kill()
                replica.start()
                return True
        return False

    def assets(self) -> list[Path]:
        return sorted((self.rig.root / "assets").iterdir())

    def calls(self) -> Counter[str]:
        """How many calls were begun, and how many ended by making or finding an asset."""
        lines = (self.rig.root / "calls").read_text(encoding="ascii").splitlines()
        return Counter(line.split()[0] for line in lines)


@pytest.fixture
def show(rig: Any) -> Iterator[Show]:
    """Both replicas have been started."""
    (rig.root / "assets").mkdir()
    flags = {
        "provisioner-name": rig.name,
        "kubeconfig": rig.plane.kubeconfig,
        "root": rig.root,
        "latency": 0.3 if IN_FULL else 0.1,
        "leader-elect-lease-duration": 3,
        "leader-elect-renew-deadline": 2,
        "leader-elect-retry-period": 0.5,
        "leader-elect-resource-namespace": rig.namespace,
    }
    logs = (rig.root / "first.log", rig.root / "second.log")
    replicas = Replica(flags, logs[0]), Replica(flags, logs[1])
    for replica in replicas:
        replica.start()
    yield Show(rig, replicas)
    for replica in replicas:
        replica.kill()
        # pytest shows it if the test fails.
        print(log_tail(replica.log, 40))


def kill_by_progress(show: Show, until: Until) -> list[int]:
    """How many claims were Bound at each kill."""
    bound = []
    for goal in KILLS_AT:
        until(lambda goal=goal: show.bound() >= goal, f"{goal} claims are Bound")
        until(show.kill_the_leader, "somebody leads")
        bound.append(show.bound())
    return bound


def kill_by_time(show: Show, until: Until) -> list[int]:
    bound, begun = [], time.monotonic()
    while time.monotonic() - begun < KILL_FOR_S or show.bound() < CLAIMS:
        next_kill = time.monotonic() + KILL_EVERY_S
        until(lambda at=next_kill: time.monotonic() >= at, "five seconds")
        until(show.kill_the_leader, "somebody leads")
        bound.append(show.bound())
    return bound


@pytest.mark.timeout(600)
def test_no_asset_is_lost_or_made_twice_while_leaders_are_killed(
    show: Show, rig: Any, until: Until
) -> None:
    storage_class = rig.storage_class()
    for number in range(CLAIMS):
        rig.claim(f"claim-{number}", storage_class)
    begun = time.monotonic()
    kills = kill_by_time(show, until) if IN_FULL else kill_by_progress(show, until)
    until(lambda: show.bound() == CLAIMS, "all claims are Bound", limit_s=240)
    seconds = round(time.monotonic() - begun, 1)
    assets = show.assets()
    calls = show.calls()
    cut = calls["begin"] - calls["made"] - calls["found"]
    print(f"bound at each kill {kills}, {calls}, {cut} calls cut off, all Bound in {seconds} s")
    assert len(kills) >= 3
    assert IN_FULL or all(bound < CLAIMS for bound in kills)
    assert cut > 0, "no kill fell into a call"
    volumes = rig.volumes()
    assert sorted(v.spec.claim_ref.name for v in volumes) == sorted(
        f"claim-{number}" for number in range(CLAIMS)
    )
    twice = [name for name, n in Counter(path.stem for path in assets).items() if n > 1]
    assert twice == []
    assert {str(path) for path in assets} == {v.spec.host_path.path for v in volumes}
