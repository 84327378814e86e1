"""A package made from the template passes, unchanged, all that the repository asks of one."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from new_provisioner import LONGEST, BadName, check_name

ROOT = Path(__file__).resolve().parents[2]
Passes = Callable[[subprocess.CompletedProcess[str]], None]

# Some of them run a whole test suite, or mypy for the first time.
pytestmark = pytest.mark.timeout(1000)


def test_the_new_package_has_all_that_the_others_have(rendered: Any) -> None:
    new = rendered.root / "rendered-store"
    for name in ("README.md", "CHANGELOG.md", "Dockerfile", "pyproject.toml"):
        assert (new / name).is_file()
    assert {path.name for path in (new / "src" / "rendered_store_provisioner").glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "provisioner.py",
        "settings.py",
    }
    kept = {"kustomization.yaml", "rbac.yaml", "deployment.yaml", "class.yaml", "examples"}
    assert kept <= {path.name for path in (new / "deploy").iterdir()}


def test_nothing_of_the_template_s_own_name_is_left(rendered: Any) -> None:
    for path in (rendered.root / "rendered-store").rglob("*"):
        assert not re.search("new.?store", str(path), re.IGNORECASE)
        if path.is_file() and path.suffix != ".pyc":
            assert not re.search("new.?store", path.read_text(), re.IGNORECASE), path


def test_everything_that_lists_packages_lists_it(rendered: Any, passes: Passes) -> None:
    passes(rendered.script("generate", "--check"))
    assert "[rendered-store](rendered-store/README.md)" in rendered.read("README.md")
    assert "-e ./rendered-store" in rendered.read("tox.ini")
    assert rendered.read("pyproject.toml").count('"rendered_store_provisioner"') == 5
    assert "!rendered-store/" in rendered.read(".dockerignore")
    assert "`--volume-root`" in rendered.read("rendered-store/README.md")


def test_its_style_is_right(rendered: Any, passes: Passes) -> None:
    passes(rendered.run("ruff", "check", "--no-cache", "rendered-store"))
    passes(rendered.run("ruff", "format", "--no-cache", "--check", "rendered-store"))


def test_the_longest_name_makes_no_line_too_long(copy: Any, passes: Passes) -> None:
    name = "a-name-" + "x" * (LONGEST - 7)
    passes(copy.script("new_provisioner", name))
    passes(copy.run("ruff", "check", "--no-cache", name))
    passes(copy.run("ruff", "format", "--no-cache", "--check", name))


def test_its_imports_are_allowed(rendered: Any, passes: Passes) -> None:
    passes(rendered.run("lint-imports", "--no-cache"))


def test_its_types_are_right(rendered: Any, passes: Passes) -> None:
    # The same cache for each run: nothing but the new package is looked at again.
    cache = ("--cache-dir", str(ROOT / ".mypy_cache" / "template"))
    config = ("--config-file", "../pyproject.toml", "--explicit-package-bases")
    passes(rendered.run("mypy", *cache, *config, "src", "tests", below="rendered-store"))


def test_its_tests_pass(rendered: Any, passes: Passes) -> None:
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "rendered-store/tests")
    done = rendered.run(*command)
    passes(done)
    assert re.search(r"\b[1-9][0-9]* passed", done.stdout)
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Demo", "lowercase"),
        ("1st", "a letter first"),
        ("a--b", "single hyphens"),
        ("a-", "single hyphens"),
        ("a_b", "hyphens"),
        ("../a", "hyphens"),
        ("", "a letter first"),
        ("a" * (LONGEST + 1), f"at most {LONGEST}"),
        ("nfs", "there is a nfs already"),
        ("lint", "tox.ini"),
        ("my-provisioner", "is added"),
        ("store-py311", "Python interpreter"),
        ("new-store", "template's own"),
    ],
)
def test_a_name_that_no_package_can_have_is_refused(name: str, words: str) -> None:
    with pytest.raises(BadName, match=re.escape(words)):
        check_name(name, ROOT)


def test_a_bad_name_is_told_in_one_line_and_makes_nothing(copy: Any) -> None:
    before = sorted(path.name for path in copy.root.iterdir())
    done = copy.script("new_provisioner", "Demo")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in copy.root.iterdir()) == before


def test_when_it_fails_nothing_is_left(copy: Any) -> None:
    copy.change("README.md", "<!-- generated: provisioners -->\n", "")
    before = sorted(path.name for path in copy.root.iterdir())
    done = copy.script("new_provisioner", "rendered-store")
    assert done.returncode == 1
    assert "<!-- generated: provisioners -->" in done.stderr
    assert sorted(path.name for path in copy.root.iterdir()) == before
