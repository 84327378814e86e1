"""Where a directory is by the kernel's word: on which server, at which path of it."""

from __future__ import annotations

import ipaddress
import os
import posixpath
from dataclasses import dataclass
from pathlib import Path

from external_storage import mountinfo
from external_storage.mountinfo import Mount

NFS = frozenset({"nfs", "nfs4"})


class WrongMount(Exception):
    """What is mounted is not what was expected; the text is for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What has to be mounted where a share's directory is."""

    source: str
    """``server:/path``, as the mount has it; for one that has no server its device or name
    (``/dev/vdb``), with ``:/path`` for a directory below its root. An IPv6 address is in brackets.
    The mount may be of a directory above: then the way from there on is compared, too."""
    fs_types: frozenset[str] = NFS
    """As mountinfo names them."""

    @staticmethod
    def nfs(server: str, path: str) -> Expected:
        """An NFS mount of ``path`` of a server, its address with or without brackets."""
        host = f"[{server}]" if ":" in server and not server.startswith("[") else server
        return Expected(source=f"{host}:{server_path(path)}")

    def verify(self, descriptor: int) -> None:
        """Raise ``WrongMount`` unless the open directory is there and can be written to."""
        try:
            mount = mountinfo.of_descriptor(descriptor)
        except LookupError as error:
            raise WrongMount(f"it is not mounted any more: {error}") from error
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115 - no path is meant
        if mount.fs_type not in self.fs_types:
            wanted = " or ".join(sorted(self.fs_types))
            raise WrongMount(
                f"{self.source} is not mounted at {place}: want a file system of type {wanted}, "
                f"there is {mount.fs_type} ({mount.source})"
            )
        found = _location(mount, place)
        if found != _parts(self.source):
            raise WrongMount(f"{_text(found)} is mounted at {place}: want {self.source}")
        if mount.read_only:
            raise WrongMount(f"{self.source} is mounted read-only at {place}")


def server_path(path: str) -> str:
    """An absolute path of a server with one slash between the segments and none at its end.

    ValueError for one that is relative or has ``..`` in it.
    """
    if not path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} is not an absolute path without '..'")
    return "/" + posixpath.normpath(path).lstrip("/")


def join(base: str, relative: str) -> str:
    """The server's path of what is at ``relative`` below its directory ``base``."""
    return f"{server_path(base).rstrip('/')}/{relative}"


def below(base: str, path: str) -> str | None:
    """The part of the server's ``path`` below its directory ``base``; None if it is not strictly
    below, or not a plain path. Compared by whole segments: /data2 is not below /data."""
    try:
        text, above = server_path(path), server_path(base).rstrip("/") + "/"
    except ValueError:
        return None
    return text[len(above) :] if text.startswith(above) and len(text) > len(above) else None


def same_server(one: str, other: str) -> bool:
    """Whether two texts name one server: case, brackets and the spelling of IPv6 do not count."""
    return _server(one) == _server(other)


def _location(mount: Mount, place: Path) -> tuple[str, str]:
    server, exported = _parts(mount.source)
    try:
        way = place.relative_to(mount.mount_point)
    except ValueError:
        raise WrongMount(f"{place} has been moved or removed") from None
    return server, server_path(f"{exported}/{mount.root}/{way}")


def _parts(source: str) -> tuple[str, str]:
    server, found, path = source.partition(":/")
    return _server(server), server_path("/" + path) if found else "/"


def _server(text: str) -> str:
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        # A device's name has capitals that count, the name of a host has not.
        return bare if "/" in bare else bare.lower().rstrip(".")


def _text(place: tuple[str, str]) -> str:
    server, path = place
    return f"[{server}]:{path}" if ":" in server else f"{server}:{path}"
