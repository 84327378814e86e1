"""AWS's place taken by moto and our fault layer, and the parts of the provisioner upon it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# So that they find their helpers, as ``tests.faulty_efs``.
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.access_points import Rig
from tests.faulty_efs import FaultyEfs


@pytest.fixture(scope="session")
def _efs_server() -> Iterator[FaultyEfs]:
    with FaultyEfs() as server:
        yield server


@pytest.fixture
def efs(_efs_server: FaultyEfs, monkeypatch: pytest.MonkeyPatch) -> FaultyEfs:
    """EFS without access points and faults; this process meets it in AWS's place, too."""
    _efs_server.reset()
    for key, value in _efs_server.environment.items():
        monkeypatch.setenv(key, value)
    return _efs_server


@pytest.fixture
def file_system(efs: FaultyEfs) -> str:
    return efs.make_file_system(targets=True)


@pytest.fixture
def rig(efs: FaultyEfs, file_system: str) -> Rig:
    return Rig(efs, file_system)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Any]:
    """Mount a tmpfs that says to be of ``server:path``; all are unmounted at the end."""
    places: list[Path] = []

    def mount(source: str, name: str = "mount") -> Path:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", source, str(place)]
        subprocess.run(command, check=True)
        places.append(place)
        return place

    yield mount
    for place in places:
        # Lazily: a worker that is being killed may still be in it.
        subprocess.run(["umount", "--lazy", str(place)], check=False, capture_output=True)
