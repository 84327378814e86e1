"""LVM for tests of the helper: what its commands answer, over a dictionary."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from iscsi_targetd_provisioner.host.common import Refused, kind_of

MIB = 1 << 20
EXTENT = 4 * MIB
GROUP = "vg-iscsi"


@dataclass
class LvmModel:
    """One volume group with one thin pool; sizes as LVM would make them."""

    sys: Path
    size: int = 256 * MIB
    thin_size: int = 64 * MIB
    volumes: dict[str, dict[str, str]] = field(default_factory=dict)
    away: bool = False
    """The volume group's disks are not there."""
    fill: float = 0.0
    """Per cent of the thin pool."""
    service: str = "enabled"
    """Which restores the targets after a boot."""
    calls: list[str] = field(default_factory=list)
    before: Callable[[str], None] = lambda _command: None

    def run(self, argv: Sequence[str], _limit_s: float) -> str:
        command = argv[0]
        self.calls.append(command)
        self.before(command)
        if command == "systemctl":
            return self.service
        if self.away and command != "vgs":
            said = (
                f'{command}: Volume group "{GROUP}" not found Cannot process volume group {GROUP}'
            )
            raise Refused(kind_of(said), said)
        found: str = getattr(self, command)(list(argv))
        return found

    def vgs(self, _argv: list[str]) -> str:
        used = sum(int(v["lv_size"]) for v in self.volumes.values() if not v["pool_lv"])
        free = self.size - self.thin_size - used
        rows = (
            []
            if self.away
            else [{"vg_name": GROUP, "vg_size": str(self.size), "vg_free": str(free)}]
        )
        return json.dumps({"report": [{"vg": rows}]})

    def lvs(self, argv: list[str]) -> str:
        pool = _row("thin", self.thin_size, "", "twi-aotz--", "")
        pool["data_percent"] = str(self.fill)
        rows = [pool, *self.volumes.values()]
        what = argv[-1].partition("/")[2] if "/" in argv[-1] else ""
        if what:
            rows = [row for row in rows if row["lv_name"] == what]
            if not rows:
                said = f'lvs: Failed to find logical volume "{argv[-1]}"'
                raise Refused(kind_of(said), said)
        return json.dumps({"report": [{"lv": rows}]})

    def lvcreate(self, argv: list[str]) -> str:
        name, tag = _after(argv, "--name"), _after(argv, "--addtag")
        if name in self.volumes:
            said = f'Logical Volume "{name}" already exists in volume group "{GROUP}"'
            raise Refused(kind_of(said), said)
        thin = "--thinpool" in argv
        size = _rounded(_after(argv, "--virtualsize" if thin else "--size"))
        if not thin:
            self._check(size)
        self.volumes[name] = _row(name, size, "thin" if thin else "", "Vwi-a-tz--", tag)
        self._show(name, size)
        return ""

    def lvextend(self, argv: list[str]) -> str:
        row = self.volumes[argv[-1].partition("/")[2]]
        size = _rounded(_after(argv, "--size"))
        if not row["pool_lv"]:
            self._check(size - int(row["lv_size"]))
        row["lv_size"] = str(size)
        self._show(row["lv_name"], size)
        return ""

    def lvremove(self, argv: list[str]) -> str:
        del self.volumes[argv[-1].partition("/")[2]]
        return ""

    def _check(self, size: int) -> None:
        used = sum(int(v["lv_size"]) for v in self.volumes.values() if not v["pool_lv"])
        if size > self.size - self.thin_size - used:
            said = f'Volume group "{GROUP}" has insufficient free space'
            raise Refused(kind_of(said), said)

    def _show(self, name: str, size: int) -> None:
        for file, text in (
            ("size", str(size // 512)),
            ("dm/uuid", f"LVM-{name}"),
            ("queue/discard_max_bytes", "4194304"),
        ):
            path = self.sys / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")


def _row(name: str, size: int, pool: str, attr: str, tags: str) -> dict[str, str]:
    row = {"vg_name": GROUP, "lv_name": name, "lv_size": str(size), "pool_lv": pool}
    return {**row, "lv_tags": tags, "lv_attr": attr, "data_percent": "", "metadata_percent": ""}


def _after(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def _rounded(sectors: str) -> int:
    return -(-int(sectors.removesuffix("s")) * 512 // EXTENT) * EXTENT
