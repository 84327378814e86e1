"""What went wrong with a directory on a share, in words for people."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from external_storage.assets import DamagedRecord
from external_storage.shares.layout import PRIVATE
from external_storage.shares.results import DirectoryRefused
from external_storage.shares.share import Share


@contextmanager
def told(share: Share, path: str) -> Iterator[None]:
    """``DirectoryRefused`` for what the server says about the directory at ``path``."""
    try:
        yield
    except DamagedRecord as error:
        raise DirectoryRefused(f"the record of the volume is damaged: {error}") from error
    except OSError as error:
        text = f"{share}: {path}: {error.strerror or error}"
        if isinstance(error.filename, str) and not error.filename.startswith((path, PRIVATE)):
            text += f" (at {error.filename})"
        if error.errno in (errno.EPERM, errno.EACCES) and share.server_maps_root:
            text += (
                "; the server lets us work as another user than root (root_squash, all_squash):"
                " export it to us with no_root_squash, or ask for no owner"
            )
        raise DirectoryRefused(text) from error
