"""What ``local-volume clean | offer | retire`` ask of the agent: files in its state directory.

Whoever can write there is root on the node already: no right in the cluster, and no open port, can
have a disk wiped. A request stays until it has been met, also over a restart.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from pathlib import Path

import msgspec

from external_storage import get_logger, replace_file

log = get_logger(__name__)

_SUFFIX = ".json"


class Wish(StrEnum):
    """What is asked for."""

    CLEAN = "clean"
    OFFER = "offer"
    RETIRE = "retire"


class Request(msgspec.Struct, frozen=True):
    """``target`` is a path on the host or the name of a volume; the rest is what was shown of it
    when it was asked for: an approval does not hold for another disk or another user's data."""

    wish: Wish
    target: str
    uid: str = ""
    """Of the volume."""
    disk: str = ""
    """``digest`` of the identity."""


_decoder = msgspec.json.Decoder(Request)


class Requests:
    """The files in one directory."""

    def __init__(self, state_directory: Path) -> None:
        self.directory = state_directory / "requests"

    def prepare(self) -> None:
        """Raises OSError."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def add(self, request: Request) -> None:
        """Raises OSError."""
        replace_file(self._path(request), msgspec.json.encode(request))

    def remove(self, request: Request) -> None:
        self._path(request).unlink(missing_ok=True)

    def is_open(self, request: Request) -> bool:
        """Whether it has not been met yet."""
        return self._path(request).exists()

    def all(self) -> list[Request]:
        found = []
        for path in sorted(self.directory.glob(f"*{_SUFFIX}")):
            try:
                found.append(_decoder.decode(path.read_bytes()))
            except FileNotFoundError:
                continue
            except (OSError, msgspec.DecodeError) as error:
                log.error("a request cannot be read", file=str(path), error=str(error))
        return found

    def _path(self, request: Request) -> Path:
        digest = hashlib.sha256(f"{request.wish}\0{request.target}".encode()).hexdigest()[:24]
        return self.directory / f"{request.wish}-{digest}{_SUFFIX}"
