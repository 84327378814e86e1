"""Files and directories that are there after a power cut: fsync in the right places."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(target: Path, content: str | bytes, *, staging: Path | None = None) -> None:
    """Make ``target`` hold ``content``: it has the old content or all of the new, never a part.

    It is written to ``staging`` (default: beside the target, same name with ``.tmp``), which
    must be on the target's file system; a left-over from a killed process is overwritten.
    Mode 0600. Raises OSError.
    """
    temporary = staging or target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(target)
    sync_directory(target.parent)


def sync_directory(directory: Path | int) -> None:
    """Make the names in ``directory`` (a path or an open descriptor) durable. Raises OSError."""
    if isinstance(directory, int):
        os.fsync(directory)
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
