"""What AWS takes as the root directory of an access point, checked before it is asked."""

from __future__ import annotations

import re
from typing import Final

MAX_LEVELS: Final = 4
MAX_LENGTH: Final = 100

_SEGMENT = re.compile(r"[^$#<>;`|&?{}^*/\n]+")
_REFUSED: Final = "$ # < > ; ` | & ? { } ^ *"


def check(path: str) -> str:
    """``path`` itself, absolute and below the root of the file system.

    Raises ValueError for what AWS would refuse, and for ``/``: who mounts an access point of the
    root has the data of everybody.
    """
    if not path.startswith("/"):
        raise ValueError(f"{path!r} is not absolute")
    segments = path[1:].split("/")
    if segments == [""]:
        raise ValueError("the root directory of the file system is given to nobody")
    if "" in segments:
        raise ValueError(f"{path!r} has an empty directory name in it")
    for segment in segments:
        if segment.startswith("."):
            raise ValueError(f"{path!r}: AWS takes no directory name that begins with a dot")
        if not _SEGMENT.fullmatch(segment):
            raise ValueError(f"{path!r}: AWS takes none of {_REFUSED} in {segment!r}")
    if len(segments) > MAX_LEVELS:
        raise ValueError(f"{path!r} has {len(segments)} levels: AWS takes at most {MAX_LEVELS}")
    if len(path) > MAX_LENGTH:
        raise ValueError(f"{path!r} has {len(path)} characters: AWS takes at most {MAX_LENGTH}")
    return path


def join(base_path: str, relative: str) -> str:
    """The absolute path of what is at ``relative`` below the class's ``basePath``."""
    base = base_path.strip("/")
    return f"/{base}/{relative}" if base else f"/{relative}"


def overlap(one: str, other: str) -> bool:
    """Whether two directories are the same, or one is in the other."""
    first, second = (path.rstrip("/") + "/" for path in (one, other))
    return first.startswith(second) or second.startswith(first)
