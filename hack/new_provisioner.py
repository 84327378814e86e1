"""Makes a package of its own out of hack/template; started by hack/new-provisioner.

The template is a package that works, under a name that occurs nowhere else; rendering it is putting
another name in that one's place, in files and in their paths. So the linters read it as it is.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "hack/new-provisioner"
TEMPLATE = "new-store"
LONGEST = 40

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", re.ASCII)
# tox would take such a part of an environment's name for the Python to run it with.
_INTERPRETER = re.compile(r"(py|pypy|cpython|jython|graalpy|rustpython|ironpython)[0-9]*t?d?")
_LEFT_OUT = ("__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis")

_NEXT = (
    ("hack/test {name}", "its tests, on a real control plane"),
    ("hack/test lint types imports", "style, types, import rules"),
    ("grep -rn REPLACE {name}", "what belongs to directories: put your back end there"),
    ("hack/generate", "after a change of its flags, parameters or metadata"),
    ("hack/build-images {name}", "its image"),
)


class BadName(Exception):
    """A name that no package can have; the text says why and what is allowed."""


def check_name(name: str, root: Path) -> None:
    """``BadName`` unless ``name`` can be the directory of a new provisioner below ``root``."""
    if not _NAME.fullmatch(name):
        raise BadName(
            f"{name!r}: want lowercase letters, digits and single hyphens, a letter first: my-store"
        )
    if len(name) > LONGEST:
        raise BadName(f"{name!r}: has {len(name)} characters, at most {LONGEST} are allowed")
    if name.endswith("provisioner"):
        raise BadName(f"{name!r}: name the back end only, -provisioner is added where it is needed")
    if name == TEMPLATE:
        raise BadName(f"{name!r}: is the template's own name")
    for part in name.split("-"):
        if _INTERPRETER.fullmatch(part):
            raise BadName(f"{name!r}: tox takes {part!r} for a Python interpreter")
    if name in _environments(root):
        raise BadName(f"{name!r}: is an environment in tox.ini")
    if (root / name).exists():
        raise BadName(f"{name!r}: there is a {name} already")


def words(name: str) -> Mapping[str, str]:
    """What stands for the template's name, by each way of writing that."""
    camel = "".join(part.capitalize() for part in name.split("-"))
    return {"new-store": name, "new_store": name.replace("-", "_"), "NewStore": camel}


def render(template: Path, target: Path, name: str) -> None:
    """Write the template under its new name into ``target``, which must not exist."""
    replaced = words(name)
    for source in _files(template):
        path = target / _renamed(str(source.relative_to(template)), replaced)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_renamed(source.read_text(), replaced))
        shutil.copymode(source, path)


def make(name: str, root: Path) -> None:
    """The package, complete, in ``root``, and everything that lists packages brought up to date.

    Raises ``subprocess.CalledProcessError`` if a tool fails; then there is no new directory.
    """
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as staging:
        made = Path(staging) / name
        render(root / "hack" / "template", made, name)
        # Another name sorts differently among the imports and makes other lines too long.
        config = ("--config", str(root / "pyproject.toml"), "--no-cache", "--quiet")
        first_party = ["external_storage", f"{name.replace('-', '_')}_provisioner"]
        option = f"lint.isort.known-first-party={first_party!r}"
        _run("ruff", "check", "--fix", "--select=I", *config, "--config", option, str(made))
        _run("ruff", "format", *config, str(made))
        made.rename(root / name)
    try:
        _run(sys.executable, str(root / "hack" / "generate.py"))
    except BaseException:
        shutil.rmtree(root / name)
        raise


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Makes a new provisioner.")
    parser.add_argument("name", help="of its directory, such as my-store")
    name: str = parser.parse_args(argv).name
    try:
        check_name(name, ROOT)
        make(name, ROOT)
    except BadName as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 1
    _say_what_next(name)
    return 0


def _say_what_next(name: str) -> None:
    commands = [(command.format(name=name), what) for command, what in _NEXT]
    width = max(len(command) for command, _ in commands) + 4
    print(f"\n{name}/ is a provisioner that works: volumes are directories. What to do next:\n")
    for command, what in commands:
        print(f"  {command:<{width}}{what}")


def _environments(root: Path) -> set[str]:
    """The names that tox.ini gives a meaning of their own."""
    config = ConfigParser(interpolation=None)
    config.read(root / "tox.ini")
    return {section.removeprefix("testenv:") for section in config.sections()}


def _files(template: Path) -> Iterable[Path]:
    for path in sorted(template.rglob("*")):
        if path.is_file() and not set(path.parts) & set(_LEFT_OUT):
            yield path


def _renamed(text: str, replaced: Mapping[str, str]) -> str:
    for old, new in replaced.items():
        text = text.replace(old, new)
    return text


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
