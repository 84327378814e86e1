"""What the packages of this repository say about themselves in their ``pyproject.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIB = "lib"
_LIB_NAME = "external-storage-lib"
_TABLE = """[tool.external-storage]
provisioner = "import_name.provisioner:Class"
volumes = "what its volumes are, in a few words"
status = "how far it is\""""


class PackageError(Exception):
    """What is wrong with a package; the text names the file and says what is wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One directory with a ``pyproject.toml``: the lib or a provisioner."""

    directory: str
    import_name: str
    provisioner: str = ""
    """``module:Class`` of the provisioner; empty for the lib."""
    volumes: str = ""
    """What its volumes are, for the table in the README."""
    status: str = ""


def read_packages(root: Path) -> list[Package]:
    """The packages below ``root``: the lib, then the provisioners by name. ``PackageError``."""
    projects = {path.parent.name: _load(path) for path in sorted(root.glob("*/pyproject.toml"))}
    if LIB not in projects:
        raise PackageError(f"{root}: there is no {LIB}/pyproject.toml")
    version = str(projects[LIB]["project"]["version"])
    packages = [Package(directory=LIB, import_name=_import_name(LIB, projects[LIB]))]
    for directory, data in projects.items():
        if directory != LIB:
            _check_version(directory, data["project"], version)
            packages.append(_provisioner(directory, data))
    return packages


def lib_range(version: str) -> str:
    """What a provisioner of this version depends on: all releases of the lib that fit it."""
    major, minor, *_ = (int(part) for part in version.split("."))
    end = f"0.{minor + 1}" if major == 0 else f"{major + 1}"
    return f"{_LIB_NAME}>={major}.{minor},<{end}"


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise PackageError(f"{path.parent.name}/pyproject.toml: {error}") from error


def _import_name(directory: str, data: dict[str, Any]) -> str:
    try:
        (package,) = data["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    except (KeyError, ValueError):
        raise PackageError(
            f"{directory}/pyproject.toml: [tool.hatch.build.targets.wheel] must name one package: "
            'packages = ["src/import_name"]'
        ) from None
    return str(package).removeprefix("src/")


def _provisioner(directory: str, data: dict[str, Any]) -> Package:
    table = data.get("tool", {}).get("external-storage", {})
    missing = [key for key in ("provisioner", "volumes", "status") if not table.get(key)]
    if missing:
        raise PackageError(
            f"{directory}/pyproject.toml: {', '.join(missing)} missing; write\n{_TABLE}"
        )
    return Package(
        directory=directory,
        import_name=_import_name(directory, data),
        provisioner=table["provisioner"],
        volumes=table["volumes"],
        status=table["status"],
    )


def _check_version(directory: str, project: dict[str, Any], version: str) -> None:
    """One version for all, and each provisioner takes every lib that fits it."""
    if project.get("version") != version:
        raise PackageError(
            f"{directory}/pyproject.toml: version {project.get('version')!r} is not the lib's, "
            f"{version!r}: all packages have one version"
        )
    wanted = lib_range(version)
    if wanted not in project.get("dependencies", ()):
        raise PackageError(f"{directory}/pyproject.toml: dependencies must have {wanted!r}")
