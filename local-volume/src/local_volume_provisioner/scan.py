"""What lies in the directories of the configuration: looked at, never changed, and opened only if
it is a mounted directory.

Only the name, the table of mounts and ``stat`` decide what an entry is; opening it to find out
would hang on a FIFO and wake a tape.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from external_storage.mountinfo import Mount
from local_volume_provisioner import devices, identity
from local_volume_provisioner.config import ClassConfig, VolumeMode
from local_volume_provisioner.identity import Identity
from local_volume_provisioner.mounts import LOCAL, MountTable, uuid_of


class Kind(StrEnum):
    """What a volume is made of."""

    DEVICE = "device"
    MOUNT = "mount"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An entry that can be a volume."""

    class_config: ClassConfig
    entry: str
    kind: Kind
    size: int
    identity: Identity
    number: int
    """Of the device, or the device the file system is on."""
    family: frozenset[int]
    """Numbers of all devices that share data with it; see ``devices.family``."""
    root: str = ""
    """Of a mount: which directory of its file system it shows."""
    busy: str = ""
    """Why it must not be offered now; means nothing once it is a volume."""

    @property
    def path(self) -> str:
        """On the host: what is in the volume, and the key of everything here."""
        return f"{self.class_config.host_dir}/{self.entry}"

    @property
    def mount_path(self) -> str:
        """In our container."""
        return f"{self.class_config.mount_dir}/{self.entry}"


@dataclass(frozen=True, slots=True)
class Note:
    """An entry that is no candidate, and why."""

    class_name: str
    path: str
    text: str
    is_problem: bool
    """False: noise, such as a plain file."""


@dataclass(slots=True)
class Inventory:
    """What one look at all directories has found."""

    candidates: dict[str, list[Candidate]] = field(default_factory=dict)
    """By path: two classes may want one entry."""
    notes: dict[str, Note] = field(default_factory=dict)
    class_problems: dict[str, str] = field(default_factory=dict)
    """By class: why its directory cannot be looked at."""

    def add(self, found: Candidate | Note) -> None:
        if isinstance(found, Candidate):
            self.candidates.setdefault(found.path, []).append(found)
        else:
            self.notes.setdefault(found.path, found)


Measure = Callable[[str], tuple[int, int, int]]
"""``st_mode``, ``st_rdev`` and bytes of what is mounted at a path."""


def measure(path: str) -> tuple[int, int, int]:
    found = Path(path).stat()
    size = 0
    if stat.S_ISDIR(found.st_mode):
        facts = os.statvfs(path)
        size = facts.f_blocks * facts.f_frsize
    return found.st_mode, found.st_rdev, size


class Scanner:
    """Looks at entries. ``measure_remote`` is asked about file systems that may hang."""

    def __init__(self, measure_remote: Measure = measure) -> None:
        self._measure_remote = measure_remote

    def scan(self, classes: Mapping[str, ClassConfig], table: MountTable) -> Inventory:
        """Everything in the directories of all classes."""
        inventory = Inventory()
        points = table.by_point()
        used = {mount.device: mount.mount_point for mount in table.mounts}
        swaps = devices.swaps()
        for config in classes.values():
            try:
                names = sorted(os.listdir(config.mount_dir))  # noqa: PTH208
            except OSError as error:
                text = f"mountDir {config.mount_dir}: {error.strerror}"
                inventory.class_problems[config.name] = text
                continue
            for name in names:
                if config.globs.match(name):
                    inventory.add(_Look(config, name, points, used, swaps, self).look())
        return inventory

    def look(self, config: ClassConfig, name: str, table: MountTable) -> Candidate | Note:
        """At one entry, whether its name matches or not."""
        used = {mount.device: mount.mount_point for mount in table.mounts}
        return _Look(config, name, table.by_point(), used, devices.swaps(), self).look()

    def measure(self, mount: Mount) -> tuple[int, int, int]:
        ask = measure if mount.fs_type in LOCAL else self._measure_remote
        return ask(mount.mount_point)


@dataclass(frozen=True, slots=True)
class _Look:
    """One entry, and what is known about the node."""

    config: ClassConfig
    name: str
    points: Mapping[str, Mount]
    used: Mapping[int, str]
    swaps: set[int]
    scanner: Scanner

    def look(self) -> Candidate | Note:
        try:
            return self._look()
        except FileNotFoundError:
            return self._note("is not there", problem=True)
        except (OSError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            return self._note(f"cannot be looked at: {why}", problem=True)

    def _look(self) -> Candidate | Note:
        path = f"{self.config.mount_dir}/{self.name}"
        if not _is_text(self.name):
            return self._note("its name is not valid UTF-8", problem=True)
        mount = self.points.get(path)
        if mount is not None:
            mode, number, size = self.scanner.measure(mount)
            if stat.S_ISDIR(mode):
                return self._mounted(mount, size)
        else:
            found = os.lstat(path)
            is_link = stat.S_ISLNK(found.st_mode)
            if is_link:
                found = self._target(path)
            mode, number = found.st_mode, found.st_rdev
            if stat.S_ISDIR(mode):
                return self._directory(is_link=is_link)
        if stat.S_ISBLK(mode):
            return self._device(number)
        return self._note("is neither a mounted directory nor a block device", problem=False)

    def _target(self, path: str) -> os.stat_result:
        try:
            return Path(path).stat()
        except FileNotFoundError:
            target = Path(path).readlink()
            raise RuntimeError(f"it is a link to {target}, which is not there") from None

    def _directory(self, *, is_link: bool) -> Note:
        if is_link:
            text = "a link to a directory: mount it here, with --bind if need be"
            return self._note(text, problem=True)
        return self._note("a plain directory: nothing is mounted on it", problem=False)

    def _mounted(self, mount: Mount, size: int) -> Candidate | Note:
        if self.config.mode is VolumeMode.BLOCK:
            text = "a mounted file system cannot be a volume of volumeMode Block"
            return self._note(text, problem=True)
        number, device = _device_below(mount)
        return Candidate(
            class_config=self.config,
            entry=self.name,
            kind=Kind.MOUNT,
            size=size,
            identity=identity.of_mount(mount, uuid_of(mount), device),
            number=number,
            family=frozenset(devices.family(device) if device is not None else {number}),
            root=mount.root,
            busy="it is mounted read-only" if mount.read_only else "" if size else "its size is 0",
        )

    def _device(self, number: int) -> Candidate:
        device = devices.read(number)
        family = devices.family(device)
        return Candidate(
            class_config=self.config,
            entry=self.name,
            kind=Kind.DEVICE,
            size=device.size,
            identity=identity.of_device(device),
            number=number,
            family=frozenset(family),
            busy=self._why_busy(device),
        )

    def _why_busy(self, device: devices.Device) -> str:
        if device.size == 0:
            return "its size is 0"
        if device.read_only:
            return "it is read-only"
        for number in sorted(devices.above(device)):
            if number in self.used:
                return f"a file system on it is mounted at {self.used[number]}"
            if number in self.swaps:
                return "it is in use as swap"
        if device.holders:
            return f"it is part of {', '.join(device.holders)}"
        if device.partitions:
            return f"it has {len(device.partitions)} partitions: link those, or wipe its table"
        return ""

    def _note(self, text: str, *, problem: bool) -> Note:
        # What is no text is shown escaped: it goes into JSON and events.
        name = os.fsencode(self.name).decode(errors="backslashreplace")
        return Note(self.config.name, f"{self.config.host_dir}/{name}", text, problem)


def _device_below(mount: Mount) -> tuple[int, devices.Device | None]:
    """The device that a file system is on: its number, and what is known of it."""
    number = mount.device
    if mount.major == 0 and mount.source.startswith("/dev/"):
        # btrfs has a number of its own for each subvolume.
        try:
            number = Path(mount.source).stat().st_rdev or number
        except OSError:
            return number, None
    try:
        return number, devices.read(number)
    except OSError:
        return number, None


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
