"""Which NFS servers there are: from the two settings of old, or from a file for several.

The file is YAML::

    servers:
      fast:                              # the name that classes pick it by
        server: nfs1.example.com         # put into volumes; nodes mount from it
        path: /exports/fast              # put into volumes, before the directory's own path
        mountPoint: /persistentvolumes/fast
        mountOptions: [nfsvers=4.2]      # put into volumes, before the class's own

All that is wrong with a file is reported at once, each problem with the server's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import yaml

from external_storage.shares import Expected
from external_storage.shares.location import below, same_server, server_path

MOUNT_POINT: Final = Path("/persistentvolumes")
FS_TYPES: Final = ("nfs", "nfs4")
ONLY: Final = "default"
"""Name of the server when there is but one, from the settings."""

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[?[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]?", re.ASCII)
_WORD = re.compile(r"[!-~]+")


class OvercommitAction(StrEnum):
    """What happens to a claim that promises more than ``overcommit`` allows."""

    REFUSE = "refuse"
    WARN = "warn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One exported directory of one server, and where it is mounted in our pod."""

    name: str
    server: str
    """Address, as nodes mount from it."""
    path: str
    """The exported directory, absolute, without a slash at the end except for ``/`` itself."""
    mount_point: Path
    mount_options: tuple[str, ...] = ()
    fs_types: tuple[str, ...] = FS_TYPES
    source: str = ""
    """What the mount must be of, as mountinfo tells it; empty: ``server:path``, or a directory
    above ``path``."""
    overcommit: float | None = None
    """How many times its size may be promised to volumes; None: not looked at."""
    overcommit_action: OvercommitAction = OvercommitAction.REFUSE

    def expected(self) -> Expected:
        """What has to be mounted at the mount point."""
        if not self.source:
            return replace(Expected.nfs(self.server, self.path), fs_types=frozenset(self.fs_types))
        return Expected(source=self.source, fs_types=frozenset(self.fs_types))

    def relative(self, path: str) -> str | None:
        """The directory that a volume's path means; None if it is not strictly below ours."""
        return below(self.path, path)


def only_server(server: str, path: str, mount_point: Path) -> Server:
    """The one of NFS_SERVER and NFS_PATH; both have been checked."""
    host = bare_host(server)
    return Server(name=ONLY, server=host, path=server_path(path), mount_point=mount_point)


def bare_host(server: str) -> str:
    """Without the brackets of an IPv6 address: the kubelet puts them around it."""
    return server.removeprefix("[").removesuffix("]")


def host_problem(server: str) -> str | None:
    """What is wrong with the address of a server, or None."""
    if not _HOST.fullmatch(server):
        return f"{server!r} is no host name or IP address"
    return None


def path_problem(path: str) -> str | None:
    """What is wrong with the path of an export, or None."""
    if not path.startswith("/"):
        return f"{path!r} is not absolute"
    if ".." in path.split("/") or not path.isprintable():
        return f"{path!r} has '..' or a control character in it"
    return None


def mount_point_problem(path: Path) -> str | None:
    """What is wrong with a directory that a share is mounted at, or None."""
    if not path.is_absolute() or path == Path("/") or ".." in path.parts:
        return f"{str(path)!r} is not an absolute directory below /"
    return None


def read_servers(path: Path) -> tuple[list[Server], list[str]]:
    """The servers of a file, and all that is wrong with it, a sentence each."""
    try:
        content = yaml.load(path.read_bytes(), _Loader)
    except OSError as error:
        return [], [f"{path} cannot be read: {error.strerror or error}"]
    except yaml.YAMLError as error:
        return [], [f"{path} is not YAML: {' '.join(str(error).split())}"]
    if not isinstance(content, dict) or list(content) != ["servers"]:
        return [], [f"{path}: want one key, 'servers'"]
    entries = content["servers"]
    if not isinstance(entries, dict) or not entries:
        return [], [f"{path}: 'servers' is to map names to servers, at least one"]
    servers: list[Server] = []
    problems: list[str] = []
    for name, entry in entries.items():
        read = _Entry(str(name), entry)
        server = read.server()
        problems += [f"{path}: server {str(name)!r}: {problem}" for problem in read.problems]
        if not read.problems:
            servers.append(server)
    problems += [f"{path}: {problem}" for problem in _clashes(servers)]
    return servers, problems


def _clashes(servers: Sequence[Server]) -> Iterator[str]:
    """Two servers that are one: a volume could not be told to belong to either."""
    for number, one in enumerate(servers):
        for other in servers[:number]:
            names = f"servers {other.name!r} and {one.name!r}"
            if one.mount_point == other.mount_point:
                yield f"{names} have the same mountPoint {one.mount_point}"
            if not same_server(one.server, other.server):
                continue
            if one.path == other.path or one.relative(other.path) or other.relative(one.path):
                yield f"{names} overlap: {other.path} and {one.path} of {one.server}"


@dataclass(slots=True)
class _Entry:
    """One server of the file while it is read."""

    name: str
    entry: Any
    problems: list[str] = field(default_factory=list)

    def server(self) -> Server:
        """What it says; with ``problems`` it is not to be used."""
        if not _NAME.fullmatch(self.name):
            self.problems.append("the name is not of a-z, 0-9 and '-', at most 63")
        if not isinstance(self.entry, dict):
            self.problems.append("is to be a map with 'server' and 'path'")
            self.entry = {}
        if unknown := [str(key) for key in self.entry if key not in _KEYS]:
            self.problems.append(
                f"unknown {', '.join(map(repr, unknown))}; there are {', '.join(_KEYS)}"
            )
        return Server(
            name=self.name,
            server=bare_host(self._text("server", host_problem)),
            path=self._path(),
            mount_point=self._mount_point(),
            mount_options=self._words("mountOptions", ()),
            fs_types=self._words("fsTypes", FS_TYPES) or FS_TYPES,
            source=self._text("source", lambda _: None, default=""),
            overcommit=self._overcommit(),
            overcommit_action=self._action(),
        )

    def _text(
        self, key: str, problem_of: Callable[[str], str | None], *, default: str | None = None
    ) -> str:
        value = self.entry.get(key, default)
        if value is None:
            self.problems.append(f"{key}: must be given")
            return ""
        if not isinstance(value, str):
            self.problems.append(f"{key}: {value!r} is not text")
            return ""
        if problem := problem_of(value):
            self.problems.append(f"{key}: {problem}")
        return value

    def _path(self) -> str:
        path = self._text("path", path_problem)
        return path if self.problems else server_path(path)

    def _mount_point(self) -> Path:
        default = str(MOUNT_POINT / self.name)
        text = self._text("mountPoint", lambda p: mount_point_problem(Path(p)), default=default)
        return Path(text)

    def _words(self, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        value = self.entry.get(key, list(default))
        if not isinstance(value, list) or not all(
            isinstance(word, str) and _WORD.fullmatch(word) for word in value
        ):
            self.problems.append(f"{key}: {value!r} is not a list of words")
            return default
        return tuple(value)

    def _overcommit(self) -> float | None:
        value = self.entry.get("overcommit")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            self.problems.append(f"overcommit: {value!r} is not a number above 0")
            return None
        return float(value)

    def _action(self) -> OvercommitAction:
        value = self.entry.get("overcommitAction", OvercommitAction.REFUSE.value)
        allowed = [action.value for action in OvercommitAction]
        if value not in allowed:
            self.problems.append(f"overcommitAction: {value!r} is not one of: {', '.join(allowed)}")
            return OvercommitAction.REFUSE
        return OvercommitAction(value)


_KEYS: Final = (
    "server",
    "path",
    "mountPoint",
    "mountOptions",
    "fsTypes",
    "source",
    "overcommit",
    "overcommitAction",
)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice: the first one would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)
