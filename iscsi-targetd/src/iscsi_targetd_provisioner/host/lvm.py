"""Volumes as logical volumes with our tag: pool ``group`` makes thick ones, ``group/pool`` thin."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from iscsi_targetd_provisioner.host.common import Limit, Refused, change, run

TAG = "external-storage/owner="
FIELDS = "vg_name,lv_name,lv_size,pool_lv,lv_tags,lv_attr,data_percent,metadata_percent"

SYS = Path("/sys/class/block")

Row = dict[str, str]
Owners = Sequence[str]
"""All that we are called; new volumes are tagged with the first."""


class Lvm:
    """The host's LVM; sizes are bytes."""

    def __init__(self, limit_s: Limit) -> None:
        self.limit_s = limit_s

    def report(self, command: str, fields: str, *what: str) -> list[Row]:
        argv = [command, "--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields]
        (report,) = json.loads(run([*argv, *what], self.limit_s()))["report"]
        rows: list[Row] = report[command[:-1]]
        return rows

    def rows(self, *what: str) -> list[Row]:
        return self.report("lvs", FIELDS, *what)

    def owned(self, pool: str, name: str, owners: Owners) -> Row | None:
        """A volume that is ours; None if it is not there; ``Refused`` if it is another's."""
        what = f"{group_of(pool)}/{name}"
        try:
            (row,) = self.rows(what)
        except Refused as error:
            if error.kind == "not_found":
                return None
            raise
        if not _is_of(row, owners):
            text = f"logical volume {what} is not tagged {TAG}{owners[0]}: it is left alone"
            raise Refused("foreign", text)
        return row

    def volumes(self, owners: Owners) -> list[dict[str, Any]]:
        return [
            {"pool": pool_of(row), "name": row["lv_name"], "size": int(row["lv_size"])}
            for row in self.rows()
            if _is_of(row, owners)
        ]

    def pools(self, wanted: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
        """Size and what can still be promised, of each pool with its factor of overcommitment."""
        rows = self.rows()
        groups = {row["vg_name"]: row for row in self.report("vgs", "vg_name,vg_size,vg_free")}
        return [_pool(name, factor, rows, groups) for name, factor in wanted]

    def create(self, pool: str, name: str, size: int, owners: Owners, overcommit: float) -> int:
        """Make a volume, or take over ours; its size."""
        group, _, thin = pool.partition("/")
        argv = ["lvcreate", "--quiet", "--quiet", "--yes", "--name", name]
        argv += ["--addtag", TAG + owners[0]]
        if thin:
            self._check_thin(pool, name, size, overcommit)
            argv += ["--type", "thin", "--virtualsize", in_sectors(size), "--thinpool", thin, group]
        else:
            # Else the kubelet would find, and keep, the file system of whoever had the blocks.
            argv += ["--zero", "y", "--wipesignatures", "y", "--size", in_sectors(size), group]
        try:
            change(argv, self.limit_s())
        except Refused as error:
            if error.kind != "exists":
                raise
        else:
            return device_size(device_of(pool, name))
        row = self.owned(pool, name, owners)
        if row is None or row["pool_lv"] != thin:
            raise Refused("foreign", f"logical volume {group}/{name} is not of pool {pool}")
        return self.resize(pool, name, size, owners, overcommit)

    def resize(self, pool: str, name: str, size: int, owners: Owners, overcommit: float) -> int:
        row = self.owned(pool, name, owners)
        if row is None:
            raise Refused("not_found", f"logical volume {group_of(pool)}/{name} does not exist")
        if int(row["lv_size"]) >= size:
            return int(row["lv_size"])
        if "/" in pool:
            self._check_thin(pool, name, size, overcommit)
        what = f"{group_of(pool)}/{name}"
        change(["lvextend", "--quiet", "--quiet", "--size", in_sectors(size), what], self.limit_s())
        return device_size(device_of(pool, name))

    def destroy(self, pool: str, name: str, owners: Owners) -> None:
        if self.owned(pool, name, owners) is not None:
            what = f"{group_of(pool)}/{name}"
            change(["lvremove", "--quiet", "--quiet", "--yes", what], self.limit_s())

    def _check_thin(self, pool: str, name: str, size: int, overcommit: float) -> None:
        """A thin pool that promises more than it has is an admin's decision, never an accident."""
        rows = self.rows(group_of(pool))
        free = int(thin_pool_size(pool, rows) * overcommit) - promised(pool, rows, leave_out=name)
        if size > free:
            text = f"thin pool {pool} has {max(free, 0)} bytes left to promise, not {size}"
            raise Refused("no_space", text)


def _is_of(row: Row, owners: Owners) -> bool:
    return not {TAG + owner for owner in owners}.isdisjoint(row["lv_tags"].split(","))


def group_of(pool: str) -> str:
    return pool.partition("/")[0]


def pool_of(row: Row) -> str:
    return f"{row['vg_name']}/{row['pool_lv']}" if row["pool_lv"] else row["vg_name"]


def device_of(pool: str, name: str) -> str:
    return f"/dev/{group_of(pool)}/{name}"


def in_sectors(size: int) -> str:
    """As an argument: LVM takes no part of a sector, and rounds up to extents by itself."""
    return f"{-(-size // 512)}s"


def _told(device: str, what: str) -> str:
    """What the kernel tells of a device; empty: nothing."""
    try:
        return (SYS / Path(device).resolve().name / what).read_text().strip()
    except OSError:
        return ""


def device_size(device: str) -> int:
    """Of the device itself: LVM rounds up to whole extents."""
    size = _told(device, "size")
    if not size:
        raise Refused("failed", f"{device} is no block device: is the logical volume active?")
    return int(size) * 512


def can_discard(device: str) -> bool:
    """Whether what is deleted on a device gives space back: a thin pool's only way to shrink."""
    return _told(device, "queue/discard_max_bytes") not in ("", "0")


def serial_of(device: str) -> str | None:
    """By what nodes know the disk, the same each time; None: by a number made up.

    Not LVM's own id: LIO keeps only the hexadecimal digits of it, of which few are left.
    """
    text = _told(device, "dm/uuid")
    return str(uuid.uuid5(uuid.NAMESPACE_OID, text)) if text else None


def thin_pool_size(pool: str, rows: Iterable[Row]) -> int:
    for row in rows:
        if f"{row['vg_name']}/{row['lv_name']}" == pool and row["lv_attr"].startswith("t"):
            return int(row["lv_size"])
    raise Refused("not_found", f"thin pool {pool} does not exist")


def promised(pool: str, rows: Iterable[Row], *, leave_out: str = "") -> int:
    """What the volumes of a thin pool may come to need."""
    inside = (row for row in rows if pool_of(row) == pool and row["lv_name"] != leave_out)
    return sum(int(row["lv_size"]) for row in inside)


def _pool(name: str, factor: float, rows: list[Row], groups: dict[str, Row]) -> dict[str, Any]:
    group, _, thin = name.partition("/")
    if group not in groups:
        raise Refused("not_found", f"volume group {group} does not exist")
    if thin:
        size = thin_pool_size(name, rows)
        free = int(size * factor) - promised(name, rows)
    else:
        size, free = int(groups[group]["vg_size"]), int(groups[group]["vg_free"])
    return {"name": name, "size": size, "free": max(free, 0), "thin": bool(thin)}
