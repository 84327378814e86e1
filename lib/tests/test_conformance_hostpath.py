"""The example in ``examples/hostpath`` keeps every promise, and the suite finds broken ones."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from external_storage.testing import Conformance, ControlPlane, Program
from external_storage.testing.undertest import Room

EXAMPLE = Path(__file__).parents[1] / "examples" / "hostpath"


class TestHostPath(Conformance):
    """All that an author writes to have a provisioner tested."""

    manifests = (EXAMPLE / "rbac.yaml",)
    class_parameters = {"mode": "0o2770"}
    bad_parameters = {"mode": "rwx"}

    def program(self, directory: Path) -> Program:
        return Program(argv=(sys.executable, str(EXAMPLE / "hostpath.py"), f"--root={directory}"))

    def assets(self, directory: Path) -> Collection[str]:
        return [path.name for path in directory.iterdir() if not path.name.startswith(".")]

    def traces(self, directory: Path) -> Collection[str]:
        return [path.name for path in directory.glob(".records*/*")]


# What is replaced in the example, the test that must notice, and what it must say.
BROKEN = {
    "a new asset for every try": (
        ("name = request.volume_name", 'name = f"{request.volume_name}-{id(request)}"'),
        "test_a_second_try_finds_the_asset_of_the_first",
        "every claim has one volume and one asset after a crash",
    ),
    "removes what the source says": (
        ("self._remove(volume.name)", "self._remove(Path(volume.spec.host_path.path).name)"),
        "test_a_forged_volume_removes_nothing_of_others",
        "removes nothing",
    ),
    "fails on parameters by accident": (
        ("mode: int = 0o770", 'mode: str = "0o770"'),
        "test_bad_class_parameters_are_told_and_make_nothing",
        "the event about a bad parameter names it",
    ),
    "fails at the end": (
        ("self._root.close()", 'raise OSError("already closed")'),
        "test_sigterm_amid_many_claims_ends_in_order_and_loses_nothing",
        "SIGTERM ends the program with exit code 0",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_suite_finds_a_provisioner_that(
    name: str, control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    (found, replacement), test, words = BROKEN[name]
    text = (EXAMPLE / "hostpath.py").read_text()
    assert text.count(found) >= 1
    program = tmp_path / "broken.py"
    program.write_text(text.replace(found, replacement))

    class Broken(TestHostPath):
        def program(self, directory: Path) -> Program:
            return Program(argv=(sys.executable, str(program), f"--root={directory}"))

    room = Room(Broken(), control_plane, tmp_path)
    try:
        with room.bench(namespace) as bench:
            with pytest.raises(pytest.fail.Exception, match=words):
                getattr(Broken(), test)(bench)
            if bench.program.running:
                bench.program.kill()
    finally:
        room.close()
