"""What a class may say: the parameters of efs-provisioner and those of the CSI driver."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Final

from efs_provisioner import access_point_path, tags
from external_storage import Parameters
from external_storage.fields import fields_of
from external_storage.gid_allocator import MAX_GID, MIN_GID
from external_storage.path_template import BadTemplate, PathTemplate
from external_storage.shares import PRIVATE, check_path

MAX_ID: Final = 2**32 - 2
"""Of a user or group; the kernel takes the one above for "leave it alone"."""
ACCESS_POINT_GIDS: Final = (50_000, 7_000_000)

_FILE_SYSTEM = re.compile(r"fs-[0-9a-f]{8,40}", re.ASCII)
_PERMISSIONS = re.compile(r"[0-7]{3,4}", re.ASCII)
_ZONE = re.compile(r"[a-z0-9-]{1,64}", re.ASCII)


class Mode(StrEnum):
    """What the volumes of a class are."""

    DIRECTORY = "efs-dir"
    ACCESS_POINT = "efs-ap"


class OnDelete(StrEnum):
    """What becomes of a deleted volume's directory."""

    DELETE = "delete"
    ARCHIVE = "archive"
    RETAIN = "retain"


_ONLY_DIRECTORY: Final = ("gid_allocate", "gid_min", "gid_max")
_ONLY_ACCESS_POINT: Final = ("gid_range_start", "gid_range_end", "tags")


def file_system_problem(text: str) -> str | None:
    """What is wrong with the id of a file system, or None."""
    if not _FILE_SYSTEM.fullmatch(text):
        return f"{text!r} is no id of a file system: want fs- and 8 to 40 hexadecimal digits"
    return None


class EfsParameters(Parameters):
    """Parameters of a class of efs-provisioner."""

    provisioning_mode: Mode = Mode.DIRECTORY
    """`efs-dir`: directories, mounted by NFS as efs-provisioner's volumes were. `efs-ap`: access
    points, mounted by the node plugin of the EFS CSI driver."""

    file_system_id: str | None = None
    """The file system, of those that the provisioner has; without it the one with the fewest
    volumes."""

    base_path: str = ""
    """Directory of the file system (`efs-ap`) or below the mounted one (`efs-dir`) that the volumes
    are below; empty: the top."""

    sub_path_pattern: str = ""
    """Path below `basePath`, such as `${.PVC.namespace}/${.PVC.name}`; empty: the volume's name
    (`efs-ap`) or claim and volume (`efs-dir`)."""

    ensure_unique_directory: bool = True
    """Whether the claim's UID is added to what `subPathPattern` gives; `false`: a directory that is
    there, and that no other volume has, is taken over as it is."""

    directory_perms: str = ""
    """Mode of new directories, octal; empty: `700` with `efs-ap`, else `2771` with a group of its
    own and `777` without."""

    uid: int | None = None
    """Owner of new directories and, with `efs-ap`, whom everybody is who mounts the volume; `none`:
    the number of the group (`efs-ap`), root (`efs-dir`)."""

    gid: int | None = None
    """Group, likewise; `none`: one of its own for each volume."""

    gid_range_start: int | None = None
    """With `efs-ap`: the lowest group that is handed out (50000)."""

    gid_range_end: int | None = None
    """With `efs-ap`: the highest (7000000)."""

    gid_allocate: bool = True
    """With `efs-dir`: whether a volume gets a group of its own; `false`: everybody can write."""

    gid_min: int = MIN_GID
    """With `efs-dir`: the lowest group that is handed out."""

    gid_max: int = MAX_GID
    """With `efs-dir`: the highest."""

    on_delete: OnDelete | None = None
    """What becomes of the directory of a deleted volume: `delete`, `archive` (renamed) or `retain`;
    `none`: `delete` with `efs-dir`; with `efs-ap` as `--delete-access-point-root-dir` says."""

    enforce_zone_affinity: bool = False
    """Whether volumes on a One Zone file system can be used only by nodes of its zone."""

    az: str = ""
    """Zone whose mount target is used, by its address; empty: the DNS name."""

    tags: str = ""
    """With `efs-ap`: more tags of the access point, `key:value key2:value2`; a backslash stands
    before a space, colon or backslash that is meant."""

    def validate(self) -> Iterable[str]:
        yield from self._foreign()
        if self.file_system_id is not None and (
            problem := file_system_problem(self.file_system_id)
        ):
            yield f"parameter 'fileSystemId': {problem}"
        yield from self._path_problems()
        yield from self._owner_problems()
        if self.az and not _ZONE.fullmatch(self.az):
            yield f"parameter 'az': {self.az!r} is no availability zone such as us-east-1a"
        try:
            tags.parse(self.tags)
        except ValueError as error:
            yield f"parameter 'tags': {error}"

    @property
    def is_access_point(self) -> bool:
        return self.provisioning_mode is Mode.ACCESS_POINT

    @property
    def gid_range(self) -> tuple[int, int]:
        """From which a volume's group is taken, inclusive."""
        if not self.is_access_point:
            return self.gid_min, self.gid_max
        low, high = ACCESS_POINT_GIDS
        return (
            low if self.gid_range_start is None else self.gid_range_start,
            high if self.gid_range_end is None else self.gid_range_end,
        )

    @property
    def allocates_gid(self) -> bool:
        """Whether each volume has a group of its own."""
        return self.gid is None and (self.is_access_point or self.gid_allocate)

    def path_template(self) -> PathTemplate | None:
        """Of ``subPathPattern``; None for the default. ``BadTemplate``."""
        if not self.sub_path_pattern:
            return None
        return PathTemplate.parse(self.sub_path_pattern, reserved=(PRIVATE,))

    def _foreign(self) -> Iterator[str]:
        """What is given and has no effect in this mode: a class that promises it would lie."""
        only, other = _ONLY_DIRECTORY, Mode.DIRECTORY
        if not self.is_access_point:
            only, other = _ONLY_ACCESS_POINT, Mode.ACCESS_POINT
        for info in fields_of(type(self)):
            if info.name in only and getattr(self, info.name) != info.default:
                yield f"parameter {info.parameter!r}: is for provisioningMode {other} only"

    def _path_problems(self) -> Iterator[str]:
        if self.base_path.strip("/"):
            base = self.base_path.strip("/")
            try:
                if self.is_access_point:
                    access_point_path.check(access_point_path.join("", base))
                else:
                    check_path(base)
            except ValueError as error:
                yield f"parameter 'basePath': {error}"
        try:
            self.path_template()
        except BadTemplate as error:
            yield f"parameter 'subPathPattern': {error}"
        if not self.sub_path_pattern and not self.ensure_unique_directory:
            yield "parameter 'ensureUniqueDirectory': false needs a subPathPattern"
        if self.directory_perms and not _PERMISSIONS.fullmatch(self.directory_perms):
            yield f"parameter 'directoryPerms': {self.directory_perms!r} is not octal, such as 700"

    def _owner_problems(self) -> Iterator[str]:
        for key, number in (("uid", self.uid), ("gid", self.gid)):
            if number is not None and not 0 <= number <= MAX_ID:
                yield f"parameter {key!r}: {number} is not 'none' or a number from 0 to {MAX_ID}"
        low, high = self.gid_range
        names = ("gidMin", "gidMax")
        minimum, maximum = MIN_GID, MAX_GID
        if self.is_access_point:
            names, minimum, maximum = ("gidRangeStart", "gidRangeEnd"), 1, MAX_ID
            if (self.gid_range_start is None) != (self.gid_range_end is None):
                yield f"parameter {names[0]!r}: give it and {names[1]}, or neither"
                return
        for name, value in zip(names, (low, high), strict=True):
            if not minimum <= value <= maximum:
                yield f"parameter {name!r}: {value} is not within {minimum} to {maximum}"
        if low > high:
            yield f"parameter {names[0]!r}: {low} is above {names[1]}, {high}"
