"""An agent is run as a provisioner is: flags, health, pages, exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from external_storage.testing import ControlPlane
from external_storage.testing.processes import free_port

PROGRAM = textwrap.dedent(
    """
    from external_storage import Agent, CannotStart, ProgramSettings, run
    from external_storage.health import Health
    from external_storage.kube.types import Node

    class CountSettings(ProgramSettings):
        start_at: int = 0
        "Where it begins."

    class Count(Agent[CountSettings]):
        "Counts nodes."
        def start(self):
            if self.settings.start_at < 0:
                raise CannotStart("--start-at: is below 0")
            self.nodes = self.settings.start_at + len(self.context.client.list_all(Node))
        def stop(self, timeout_s):
            print("stopped", flush=True)
            return True
        def health(self):
            return Health(alive={}, ready={"counted": lambda: None}, notes={})
        def pages(self):
            return {"/count": lambda: str(self.nodes).encode()}

    run(Count, name="counter")
    """
)


def command(tmp_path: Path, *flags: str) -> list[str]:
    program = tmp_path / "count.py"
    program.write_text(PROGRAM)
    return [sys.executable, str(program), *flags]


def test_it_starts_answers_and_stops(
    control_plane: ControlPlane, tmp_path: Path, until: Callable[..., object]
) -> None:
    port = free_port()
    flags = (f"--kubeconfig={control_plane.kubeconfig}", f"--http-endpoint=127.0.0.1:{port}")
    argv = command(tmp_path, *flags, "--start-at=7")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def count() -> int | None:
        try:
            with opener.open(f"http://127.0.0.1:{port}/count") as answer:
                assert answer.headers["Content-Type"] == "application/json"
                return int(json.loads(answer.read()))
        except OSError:
            return None

    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            until(count, "the page is served")
            assert (count() or 0) >= 7
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert process.stdout is not None
            assert process.stdout.read() == "stopped\n"
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--start-at=x",), 2, "--start-at: 'x' is not a whole number"),
        (("--worker-threads=1",), 2, "No such option"),
        (("--start-at=-1",), 1, "is below 0"),
    ],
)
def test_what_is_wrong_is_told(
    control_plane: ControlPlane, tmp_path: Path, flags: tuple[str, ...], code: int, said: str
) -> None:
    """Only what it has is a setting of it: nothing of claims and leases."""
    argv = command(tmp_path, f"--kubeconfig={control_plane.kubeconfig}", *flags)
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code
    assert said in done.stderr
