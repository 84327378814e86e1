"""What a class may say about its volumes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Final

from external_storage import Parameters, Seconds
from external_storage.gid_allocator import MAX_GID, MIN_GID, range_problems
from external_storage.path_template import BadTemplate, PathTemplate
from external_storage.shares import PRIVATE
from nfs_client_provisioner import ownership

DEFAULT_PATTERN: Final = "${.PVC.namespace}-${.PVC.name}-${.PV.name}"
"""The name that nfs-subdir-external-provisioner gives."""


class OnDelete(StrEnum):
    """What becomes of a directory when its volume is deleted."""

    DELETE = "delete"
    RETAIN = "retain"
    ARCHIVE = "archive"


class NfsClientParameters(Parameters):
    """Parameters of a class of nfs-client-provisioner."""

    server: str = ""
    """Name of the server in the file of `--servers`; needed only if there are several."""

    path_pattern: str = DEFAULT_PATTERN
    """Directory of a volume, below the server's path. Fields: `${.PVC.name}`,
    `${.PVC.namespace}`, `${.PVC.uid}`, `${.PVC.labels.KEY}`, `${.PVC.annotations.KEY}`,
    `${.PV.name}`; a default for a label or annotation is written `${.PVC.labels.KEY:-DEFAULT}`."""

    on_delete: OnDelete | None = None
    """What becomes of the directory when the volume is deleted: `delete`, `retain` or `archive`;
    without it `archiveOnDelete` decides."""

    archive_on_delete: bool = True
    """`true`: `archive`, `false`: `delete`; has no effect beside `onDelete`."""

    archive_retention: Seconds | None = None
    """Age at which an archived directory is removed; by default that of `--archive-retention`."""

    gid: str = "auto"
    """Group that owns the directory: `auto`, one of its own for each volume; a number; a pattern as
    in `pathPattern`; or `none`: no group, and everybody may write. Pods get the group."""

    gid_min: int = MIN_GID
    """Lowest group that `auto` takes."""

    gid_max: int = MAX_GID
    """Highest group that `auto` takes."""

    uid: str = ""
    """User that owns the directory: a number or a pattern; by default whom the server takes us
    for."""

    mode: str = ""
    """Mode of the directory, octal, or a pattern; by default `2770`, with `gid: none` `0777`."""

    shared: bool = False
    """Claims whose patterns give the same path share one directory; it stays until the last of
    them is gone. Otherwise the second claim is refused."""

    adopt: bool = False
    """A directory that is there already becomes the volume, with its owner and mode as they are.
    Otherwise its claim is refused."""

    def validate(self) -> Iterable[str]:
        yield from _problem("pathPattern", self.template)
        yield from _problem("gid", lambda: ownership.check_gid(self.gid))
        yield from _problem("uid", lambda: ownership.check_uid(self.uid))
        yield from _problem("mode", lambda: ownership.check_mode(self.mode))
        yield from range_problems(self.gid_min, self.gid_max)
        if self.archive_retention is not None and self.archive_retention <= 0:
            yield "parameter 'archiveRetention': must be above 0"

    def template(self) -> PathTemplate:
        """The parsed pattern; ``BadTemplate``."""
        # An empty pattern had no effect in nfs-subdir either.
        return PathTemplate.parse(self.path_pattern or DEFAULT_PATTERN, reserved={PRIVATE})

    @property
    def policy(self) -> OnDelete:
        """What ``onDelete`` and ``archiveOnDelete`` say together."""
        if self.on_delete is not None:
            return self.on_delete
        return OnDelete.ARCHIVE if self.archive_on_delete else OnDelete.DELETE


def _problem(key: str, check: Callable[[], object]) -> Iterable[str]:
    try:
        check()
    except (BadTemplate, ValueError) as error:
        yield f"parameter {key!r}: {error}"
