"""Long outages, idle hours and many lives, told in attempts, requests and bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from external_storage.testing import ControlPlane, FaultProxy
from external_storage.workqueue import Backoff

Until = Callable[..., Any]


@pytest.fixture
def through_proxy(proxy: FaultProxy, rig: Any) -> Any:
    rig.plane = SimpleNamespace(kubeconfig=proxy.kubeconfig())
    return rig


def test_an_idle_provisioner_without_leader_election_writes_nothing(
    through_proxy: Any, proxy: FaultProxy, until: Until
) -> None:
    """However often the clock goes round: a hundred rounds of what is done now and then."""
    rig = through_proxy
    provisioner = rig.start(declare={"keeps_records": True, "reconcile_interval_s": 0.01})
    rig.claim("data", rig.storage_class())
    rig.bound("data")
    rig.wait_event("data", "ProvisioningSucceeded")
    asked, before = len(proxy.requests), len(provisioner.reconciled)
    until(lambda: len(provisioner.reconciled) >= before + 100, "a hundred rounds")
    assert {request.verb for request in proxy.requests[asked:]} <= {"watch"}


def test_five_minutes_without_an_api_server_cost_a_few_attempts(
    through_proxy: Any, proxy: FaultProxy, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that runs fifty times as fast: 0.8 s to 30 s of back-off, and an outage of 6 s."""
    fast = Backoff(start_s=0.8 / 50, max_s=30.0 / 50, jitter=0.5)
    monkeypatch.setattr("external_storage.informer.reflector.BACKOFF", fast)
    rig = through_proxy
    provisioner = rig.start()
    storage_class = rig.storage_class()
    rig.claim("before", storage_class)
    rig.bound("before")
    reflectors = [informer.reflector for informer in rig.controller()._informers]
    before = [reflector.attempts for reflector in reflectors]
    proxy.down()
    rig.claim("meanwhile", storage_class)
    threading.Event().wait(6.0)
    attempts = [r.attempts - b for r, b in zip(reflectors, before, strict=True)]
    proxy.up()
    rig.bound("meanwhile")
    assert provisioner.provisioned == ["before", "meanwhile"]
    # At least 20 s of every 30 s are waited at the end: 5 min are some 6 quick tries and 10 to 15.
    assert all(3 <= count <= 22 for count in attempts), attempts


def test_many_lives_of_the_controller_leave_nothing_behind(
    control_plane: ControlPlane, rig: Any
) -> None:
    """A thousand with CONTROLLER_LIVES=1000; what grows with each life shows in forty as well."""
    lives = os.environ.get("CONTROLLER_LIVES", "40")
    rig.start()
    rig.claim("data", rig.storage_class())
    rig.bound("data")
    rig.manager.stop()
    program = [sys.executable, "-X", "dev", str(Path(__file__).parent / "programs" / "lives.py")]
    done = subprocess.run(
        [*program, str(control_plane.kubeconfig), rig.name, lives],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # What Python's development mode says of sockets, files and threads that nobody closed.
    assert done.stderr == ""
    left = json.loads(done.stdout)
    assert (left["threads"], left["descriptors"]) == (0, 0)
    # A leaked thread, queue or informer is many kilobytes a life.
    assert left["bytes"] < 1024 * int(lives), left
