"""Which file systems there are: from the settings of old, or from a file for several.

The file is YAML::

    fileSystems:
      fs-0123456789abcdef0:
        dnsName: data.example.com          # put into volumes; by default the name that AWS gives
        mountPoint: /persistentvolumes     # for directories: where it is mounted in our pod
        path: /volumes                     # the directory of the file system mounted there
        fsTypes: [nfs4]                    # for bind mounts and other network file systems
        source: /dev/vdb                   # likewise: what the mount must be of

Nothing of it needs AWS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from efs_provisioner.parameters import file_system_problem
from external_storage import mountinfo
from external_storage.shares import Expected
from external_storage.shares.location import same_server, server_path

FS_TYPES: Final = ("nfs4", "nfs")


class Entry(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """One file system of the file; the text of this module explains the keys."""

    dns_name: str = ""
    mount_point: str = ""
    path: str = ""
    fs_types: tuple[str, ...] = FS_TYPES
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystem:
    """A file system that volumes are made on."""

    id: str
    server: str
    """Its DNS name, or what the admin says instead; empty: not known, so no directories."""
    mount_point: Path | None = None
    """Where it is mounted in our pod; None: not at all, so no directories."""
    path: str = "/"
    """Which of its directories is mounted there."""
    fs_types: tuple[str, ...] = FS_TYPES
    source: str = ""
    """What the mount must be of, as mountinfo tells it; empty: ``server:path``."""
    aws_name: str = ""
    """The DNS name that AWS gives it, if that is known."""

    def is_at(self, server: str) -> bool:
        """Whether a volume's server is this file system's; its name may have been changed since."""
        names = (self.server, self.aws_name)
        return any(name and same_server(name, server) for name in names)

    def expected(self) -> Expected:
        """What has to be mounted at the mount point."""
        if self.source:
            return Expected(source=self.source, fs_types=frozenset(self.fs_types))
        return replace(Expected.nfs(self.server, self.path), fs_types=frozenset(self.fs_types))

    def __str__(self) -> str:
        return f"file system {self.id}"


@dataclass(frozen=True, slots=True)
class FileSystems:
    """The entries by id, before DNS names and mounts are looked for."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def found(self, dns_name: Callable[[str], str]) -> dict[str, FileSystem]:
        """With what is not said filled in: names by ``dns_name``, mounts by what is mounted now."""
        mounts = mountinfo.read()
        return {
            id: _find_mount(_file_system(id, entry, dns_name), entry, mounts)
            for id, entry in self.entries.items()
        }


def only(id: str, *, dns_name: str) -> FileSystems:
    """The one, or several without anything special, of FILE_SYSTEM_ID and DNS_NAME."""
    ids = [part.strip() for part in id.split(",") if part.strip()]
    return FileSystems({name: Entry(dns_name=dns_name) for name in ids})


def read(path: Path) -> tuple[FileSystems, list[str]]:
    """The file systems of a file, and all that is wrong with it, a sentence each."""
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        return FileSystems(), [f"{path} cannot be read: {error.strerror or error}"]
    except yaml.YAMLError as error:
        return FileSystems(), [f"{path} is not YAML: {' '.join(str(error).split())}"]
    if not isinstance(content, dict) or list(content) != ["fileSystems"]:
        return FileSystems(), [f"{path}: want one key, 'fileSystems'"]
    given = content["fileSystems"]
    if not isinstance(given, dict) or not given:
        return FileSystems(), [f"{path}: 'fileSystems' is to map ids to file systems, at least one"]
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for id, value in given.items():
        try:
            entries[str(id)] = _entry(value)
        except msgspec.ValidationError as error:
            problems.append(f"{path}: {id}: {error}")
    problems += [f"{path}: {problem}" for problem in problems_of(FileSystems(entries))]
    return FileSystems(entries), problems


def problems_of(systems: FileSystems) -> Iterator[str]:
    """What is wrong with ids, paths and mount points, a sentence each."""
    places: dict[str, str] = {}
    for id, entry in systems.entries.items():
        if problem := file_system_problem(id):
            yield problem
        if entry.path:
            try:
                server_path(entry.path)
            except ValueError as error:
                yield f"{id}: path: {error}"
        place = entry.mount_point
        if place and (not Path(place).is_absolute() or ".." in Path(place).parts or place == "/"):
            yield f"{id}: mountPoint: {place!r} is not an absolute directory below /"
        if place and places.setdefault(str(Path(place)), id) != id:
            yield f"{places[str(Path(place))]} and {id} have the same mountPoint {place}"


def _entry(value: Any) -> Entry:  # noqa: ANN401  (whatever YAML has)
    return msgspec.convert({} if value is None else value, Entry)


def _file_system(id: str, entry: Entry, dns_name: Callable[[str], str]) -> FileSystem:
    aws_name = dns_name(id)
    return FileSystem(
        id=id,
        server=entry.dns_name or aws_name,
        aws_name=aws_name,
        mount_point=Path(entry.mount_point) if entry.mount_point else None,
        path=server_path(entry.path or "/"),
        fs_types=entry.fs_types,
        source=entry.source,
    )


def _find_mount(system: FileSystem, entry: Entry, mounts: Sequence[mountinfo.Mount]) -> FileSystem:
    """With the mount that efs-provisioner would have found: the first one of its server's."""
    if entry.path or entry.source or not system.server:
        return system
    for mount in mounts:
        server, has_path, path = mount.source.partition(":/")
        if not has_path or mount.fs_type not in system.fs_types:
            continue
        if not same_server(server, system.server):
            continue
        if system.mount_point not in (None, Path(mount.mount_point)):
            continue
        whole = server_path(f"/{path}/{mount.root}")
        return replace(system, mount_point=Path(mount.mount_point), path=whole)
    return system
