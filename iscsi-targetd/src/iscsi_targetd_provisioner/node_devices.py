"""iSCSI disks of this node: found in sysfs, rescanned, and their file systems grown.

Commands are the node's own, run in its root directory: they fit its kernel, and it is with the same
ones that the kubelet makes and mounts the file systems.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from external_storage.mountinfo import Mount, parse_line

_SECTOR = 512
_COMMAND_S = 300.0
_INITIATOR_KEY = "InitiatorName"


class NodeError(Exception):
    """What cannot be done on this node, and why."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A block device of the kernel: ``sdb``, ``dm-0``."""

    name: str
    size: int
    device_number: str
    """As ``major:minor``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDevices:
    """The node whose root directory is at ``root``: ``/`` outside of a container."""

    root: Path
    sys: Path = Path("/sys")

    def initiator(self, path: Path) -> str:
        """The name in open-iscsi's file, a path on the node. Raises ``NodeError``."""
        try:
            text = self._on_node(path).read_text(encoding="utf-8")
        except OSError as error:
            raise NodeError(f"{path}: {error.strerror}: is open-iscsi installed?") from error
        for line in text.splitlines():
            key, _, value = line.partition("=")
            if key.strip() == _INITIATOR_KEY and value.strip():
                return value.strip()
        raise NodeError(f"{path}: has no line {_INITIATOR_KEY}=…")

    def disks(self, iqn: str, lun: int) -> list[Path]:
        """The SCSI devices, in sysfs, of all sessions with a target; one for each path to it."""
        found: list[Path] = []
        for session in sorted((self.sys / "class/iscsi_session").glob("session*")):
            try:
                if (session / "targetname").read_text().strip() == iqn:
                    found += sorted((session / "device").glob(f"target*/*:*:*:{lun}"))
            except OSError:
                # Logged out while we looked.
                continue
        return found

    def rescan(self, scsi_device: Path) -> Disk:
        """Have the kernel ask the target for the size again. Raises ``NodeError``."""
        try:
            (scsi_device / "rescan").write_text("1")
            (block,) = (scsi_device / "block").iterdir()
        except (OSError, ValueError) as error:
            raise NodeError(f"{scsi_device.name} cannot be rescanned: {error}") from error
        return self._disk(block.name)

    def multipath_of(self, disk: Disk) -> Disk | None:
        """The map that a disk is a path of, made as large as its paths; None: there is none."""
        holders = sorted((self.sys / "class/block" / disk.name / "holders").glob("dm-*"))
        for holder in holders:
            if (holder / "dm/uuid").read_text().startswith("mpath-"):
                name = (holder / "dm/name").read_text().strip()
                # It listens on a socket of the node's network: the pod has another.
                self._run(["multipathd", "resize", "map", name], inside=("net", "mnt"))
                return self._disk(holder.name)
        return None

    def grow(self, disk: Disk) -> bool:
        """Grow the file system on a disk to the disk's size; False: it is not mounted here."""
        mount = self._mount_of(disk)
        if mount is None:
            return False
        match mount.fs_type:
            case "ext2" | "ext3" | "ext4":
                self._run(["resize2fs", f"/dev/{disk.name}"])
            case "xfs":
                self._run(["xfs_growfs", mount.mount_point])
            case "btrfs":
                self._run(["btrfs", "filesystem", "resize", "max", mount.mount_point])
            case other:
                raise NodeError(f"{other} on {disk.name} cannot be grown while it is mounted")
        return True

    def _disk(self, name: str) -> Disk:
        base = self.sys / "class/block" / name
        size = int((base / "size").read_text()) * _SECTOR
        return Disk(name, size, (base / "dev").read_text().strip())

    def _mount_of(self, disk: Disk) -> Mount | None:
        table = self._on_node(Path("/proc/1/mountinfo")).read_bytes().splitlines()
        mounts = [parse_line(line) for line in table if line]
        for mount in mounts:
            if f"{mount.major}:{mount.minor}" == disk.device_number and not mount.read_only:
                return mount
            if mount.source == f"/dev/{disk.name}" and not mount.read_only:
                # btrfs shows a device number of its own.
                return mount
        return None

    def _on_node(self, path: Path) -> Path:
        return self.root / path.relative_to("/")

    def _run(self, argv: Sequence[str], *, inside: Sequence[str] = ()) -> None:
        """Run a command of the node; in these name spaces of its, or only in its directory."""
        command = list(argv)
        if self.root != Path("/") and inside:
            flags = {"net": "--net", "mnt": "--mount"}
            enter = [f"{flags[kind]}={self.root}/proc/1/ns/{kind}" for kind in inside]
            command = ["nsenter", *enter, "--", *argv]
        elif self.root != Path("/"):
            command = ["chroot", str(self.root), *argv]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_COMMAND_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NodeError(f"{argv[0]}: {error}") from error
        if done.returncode != 0:
            words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise NodeError(f"{argv[0]}: {words[-300:]}")
