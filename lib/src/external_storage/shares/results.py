"""What the work on a volume's directory has come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from external_storage.errors import ProvisioningFailed


class DirectoryRefused(ProvisioningFailed):
    """The server refuses what is to be done with a directory, or what is there is not ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What ``make`` found or did."""

    path: str
    """Below the share's directory."""
    server_path: str
    """On the server: for the volume."""
    adopted: bool
    """It was there before, with an owner and mode that were not touched."""
    details: Mapping[str, Any]
    """What was given to ``make``; for a directory that others share, when it was first made."""


class Ending(StrEnum):
    """What has become of a directory."""

    REMOVED = "removed"
    ARCHIVED = "archived"
    KEPT = "kept"
    SHARED = "shared"
    """Left alone: other volumes have it, too."""
    MISSING = "missing"
    """It was not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How it ended."""

    ending: Ending
    place: str = ""
    """Where it is now, below the share's directory, if it was archived."""
