"""A copy of the repository to work in, and the tools of this environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 900.0


@dataclass(frozen=True, slots=True)
class Copy:
    """The repository as it is now, committed or not, without what is made from it."""

    root: Path

    def run(self, *command: str, below: str = ".") -> subprocess.CompletedProcess[str]:
        """Run a command; the code of all packages of the copy is found before the installed one."""
        sources = [str(path) for path in self.root.glob("*/src")]
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(sources),
            "MYPYPATH": os.pathsep.join(["src", *_paths("MYPYPATH")]),
        }
        return subprocess.run(
            command,
            cwd=self.root / below,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    def script(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of the Python files in hack/."""
        return self.run(sys.executable, f"hack/{name}.py", *arguments)

    def read(self, name: str) -> str:
        return (self.root / name).read_text()

    def change(self, name: str, old: str, new: str) -> None:
        text = self.read(name)
        assert text.count(old) == 1, f"{name} does not have {old!r} once"
        (self.root / name).write_text(text.replace(old, new))


def _paths(variable: str) -> list[str]:
    return [path for path in os.environ.get(variable, "").split(os.pathsep) if path]


def copy_to(target: Path) -> Copy:
    left_out = shutil.ignore_patterns(".git", ".venv", ".tox", ".*_cache", ".hyp*", "__pycache__")
    shutil.copytree(ROOT, target, ignore=left_out, symlinks=True)
    return Copy(target)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return copy_to(tmp_path / "repository")


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """With ``rendered-store/``, made by hack/new-provisioner; not to be changed."""
    made = copy_to(tmp_path_factory.mktemp("rendered") / "repository")
    done = made.script("new_provisioner", "rendered-store")
    assert done.returncode == 0, done.stdout + done.stderr
    return made


@pytest.fixture
def passes() -> Callable[[subprocess.CompletedProcess[str]], None]:
    """Fails with what a command has printed, unless it ended well."""

    def check(done: subprocess.CompletedProcess[str]) -> None:
        assert done.returncode == 0, f"{done.args}:\n{done.stdout}{done.stderr}"

    return check
