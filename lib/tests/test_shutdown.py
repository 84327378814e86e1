"""The end of a process in the middle of its work, on the real control plane."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from external_storage.testing import ControlPlane
from external_storage.testing.program import Program, ProgramProcess

HOSTPATH = Path(__file__).parents[1] / "examples" / "hostpath" / "hostpath.py"
CLAIMS = 100
Until = Callable[..., Any]


@pytest.fixture
def process(control_plane: ControlPlane, rig: Any) -> Iterator[ProgramProcess]:
    argv = [sys.executable, str(HOSTPATH), f"--root={rig.root}", "--leader-elect=false"]
    program = Program(argv=argv)
    log = rig.root.parent / "log"
    made = ProgramProcess(program, name=rig.name, kubeconfig=control_plane.kubeconfig, log=log)
    yield made
    if made.running:
        made.kill()


def assets(rig: Any) -> set[str]:
    return {path.name for path in rig.root.iterdir() if not path.name.startswith(".")}


def test_sigterm_with_a_hundred_claims_in_flight_loses_nothing(
    process: ProgramProcess, rig: Any, until: Until, capsys: pytest.CaptureFixture[str]
) -> None:
    storage_class = rig.storage_class()
    process.start()
    with ThreadPoolExecutor(16) as pool:
        making = [pool.submit(rig.claim, f"data-{n}", storage_class) for n in range(CLAIMS)]
        until(lambda: assets(rig), "the first asset")
        started = time.monotonic()
        assert process.stop() == 0, process.tail()
        took = time.monotonic() - started
        for made in making:
            made.result()
    with capsys.disabled():
        print(f" exit after {took:.2f} s, {len(rig.volumes())} of {CLAIMS} volumes saved", end=" ")
    assert {volume.name for volume in rig.volumes()} == assets(rig)
    assert len(rig.volumes()) < CLAIMS
    process.start()
    for number in range(CLAIMS):
        rig.bound(f"data-{number}")
    assert len(rig.volumes()) == CLAIMS
    assert {volume.name for volume in rig.volumes()} == assets(rig)
