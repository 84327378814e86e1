"""Keeps the lists and tables that follow from the packages; started by hack/generate.

What is generated stands between markers, in comments of the file's own kind::

    <!-- generated: settings -->            # generated: first-party
    <!-- end generated -->                  # end generated

The rest of each file is its author's. A file keeps the markers where it wants the text to be; a
marker that nobody fills, or a text that no marker waits for, is an error.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packages import LIB, Package, PackageError, read_packages

from external_storage import Agent, Parameters, Provisioner, Settings
from external_storage.fields import FieldInfo, fields_of

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "hack/generate"
# The package that hack/template is, before it gets a name.
TEMPLATE = "new_store_provisioner"

_BEGIN = re.compile(r"(?:#|<!--) generated: ([a-z-]+)(?: -->)?")
_END = re.compile(r"(?:#|<!--) end generated(?: -->)?")

Blocks = dict[str, list[str]]
"""By the marker's name: the lines between the markers."""


class GenerateError(Exception):
    """What has to be changed by hand before anything can be generated."""


# -- what is generated


def all_blocks(root: Path, packages: Sequence[Package]) -> dict[str, Blocks]:
    """By the path of each file that has generated parts: those parts."""
    for package in reversed(packages):
        sys.path.insert(0, str(root / package.directory / "src"))
    directories = [package.directory for package in packages]
    imports = [package.import_name for package in packages]
    provisioners = packages[1:]
    files: dict[str, Blocks] = {
        "README.md": {"provisioners": provisioner_table(provisioners)},
        "tox.ini": {"packages": tox_lines(directories)},
        "pyproject.toml": {
            "first-party": toml_list("known-first-party", [*imports, TEMPLATE]),
            "root-packages": toml_list("root_packages", imports),
            "all-packages": toml_list("source_modules", imports),
            "provisioners": toml_list("source_modules", imports[1:]),
            "provisioners-apart": toml_list("modules", imports[1:]),
        },
        ".dockerignore": {"packages": [f"!{directory}/" for directory in directories]},
        f"{LIB}/README.md": {"settings": settings_table(Settings.fields())},
    }
    for package in provisioners:
        kind = load(package)
        readme = files[f"{package.directory}/README.md"] = {
            "settings": settings_table(own_fields(kind.settings_type, Settings)),
        }
        if issubclass(kind, Provisioner):
            parameters = own_fields(kind.parameters_type, Parameters)
            readme["parameters"] = parameters_table(parameters)
    return files


def provisioner_table(provisioners: Iterable[Package]) -> list[str]:
    rows = [
        (f"[{package.directory}]({package.directory}/README.md)", package.volumes, package.status)
        for package in provisioners
    ]
    return table(("provisioner", "volumes are", "status"), rows)


def tox_lines(directories: Sequence[str]) -> list[str]:
    editable = " ".join(f"-e ./{directory}[testing]" for directory in directories)
    return [f"names = {', '.join(directories)}", f"editable = {editable}"]


def toml_list(key: str, items: Iterable[str]) -> list[str]:
    return [f"{key} = [", *(f'  "{item}",' for item in items), "]"]


def settings_table(fields: Iterable[FieldInfo]) -> list[str]:
    rows = [(code(info.flag), code(info.env), default_of(info), info.doc) for info in fields]
    return table(("flag", "environment", "default", "meaning"), rows)


def parameters_table(fields: Sequence[FieldInfo]) -> list[str]:
    if not fields:
        return ["A class takes no parameters."]
    rows = [(code(info.parameter), default_of(info), info.doc) for info in fields]
    return table(("key", "default", "meaning"), rows)


def own_fields(kind: type, base: type) -> list[FieldInfo]:
    """The fields that are not just ``base``'s: those added, and those written again."""
    own: set[str] = set()
    for cls in kind.__mro__:
        if cls not in base.__mro__:
            own |= inspect.get_annotations(cls).keys()
    return [info for info in fields_of(kind) if info.name in own]


def default_of(info: FieldInfo) -> str:
    if info.name == "provisioner_name" and not info.default:
        return "the program's own"
    if info.required:
        return info.default_text
    return code(info.default_text) if info.default_text else ""


def code(text: str) -> str:
    return f"`{text}`"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [_row(heads), _row(["---"] * len(heads))]
    return lines + [_row([_cell(text) for text in row]) for row in rows]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def load(package: Package) -> type[Provisioner[Any, Any]] | type[Agent[Any]]:
    """The class that a package's metadata names."""
    where = f"{package.directory}/pyproject.toml: provisioner = {package.provisioner!r}"
    module_name, _, class_name = package.provisioner.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise GenerateError(f"{where}: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, (Provisioner, Agent))):
        raise GenerateError(f"{where}: is no Provisioner class, nor an Agent")
    program: type[Provisioner[Any, Any]] | type[Agent[Any]] = found
    return program


# -- where it is put


def fill(path: str, text: str, blocks: Mapping[str, Sequence[str]]) -> str:
    """``text`` with each block between its markers; ``GenerateError`` if the two do not match."""
    lines: list[str] = []
    filled: set[str] = set()
    inside: str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if inside is None:
            lines.append(line)
            if (begin := _BEGIN.fullmatch(line)) is None:
                continue
            inside = begin[1]
            if inside not in blocks or inside in filled:
                known = ", ".join(blocks)
                raise GenerateError(
                    f"{path}:{number}: the marker {inside!r} is unknown or given twice; "
                    f"there may be one each of: {known}"
                )
            filled.add(inside)
            lines += _spaced(path, blocks[inside])
        elif _END.fullmatch(line):
            lines.append(line)
            inside = None
    if inside is not None:
        raise GenerateError(f"{path}: the marker {inside!r} has no end: {_markers(path, inside)}")
    if missing := [name for name in blocks if name not in filled]:
        wanted = "\n".join(_markers(path, name) for name in missing)
        raise GenerateError(f"{path}: put these lines where the generated text is to be:\n{wanted}")
    return "\n".join(lines) + "\n"


def _spaced(path: str, lines: Sequence[str]) -> list[str]:
    # Without empty lines around it Markdown would take a table for a part of the comment.
    return ["", *lines, ""] if path.endswith(".md") else list(lines)


def _markers(path: str, name: str) -> str:
    if path.endswith(".md"):
        return f"<!-- generated: {name} -->\n<!-- end generated -->"
    return f"# generated: {name}\n# end generated"


def changes(root: Path) -> dict[Path, tuple[str, str]]:
    """The files that are not as they should be: what they hold, and what they should."""
    found: dict[Path, tuple[str, str]] = {}
    problems: list[str] = []
    for name, blocks in all_blocks(root, read_packages(root)).items():
        path = root / name
        try:
            text = path.read_text()
            wanted = fill(name, text, blocks)
        except FileNotFoundError:
            problems.append(f"{name}: is missing")
        except GenerateError as error:
            problems.append(str(error))
        else:
            if wanted != text:
                found[path] = (text, wanted)
    if problems:
        raise GenerateError("\n".join(problems))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Keeps lists and tables.")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if it would")
    arguments = parser.parse_args(argv)
    try:
        found = changes(ROOT)
    except (GenerateError, PackageError) as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2
    for path, (old, new) in found.items():
        name = str(path.relative_to(ROOT))
        if arguments.check:
            before, after = old.splitlines(keepends=True), new.splitlines(keepends=True)
            sys.stdout.writelines(difflib.unified_diff(before, after, name, f"{name}, generated"))
        else:
            path.write_text(new)
            print(f"{COMMAND}: wrote {name}")
    if arguments.check and found:
        print(f"{COMMAND}: out of date, run: {COMMAND}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
