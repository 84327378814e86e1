"""Disks and mounts of a test's own.

Everything here is made below the test's own directory; loop devices and mounts are undone by
``Disks.close``, whatever a test has done to them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

MIB = 1 << 20


def sh(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout.strip()


@dataclass
class Disk:
    """A loop device."""

    image: Path
    path: str

    @property
    def number(self) -> int:
        return Path(self.path).stat().st_rdev

    def read(self, offset: int = 0, length: int = -1) -> bytes:
        with self.image.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def write(self, data: bytes, offset: int = 0) -> None:
        """As a user of the device does: through the kernel, and down to the image."""
        with Path(self.path).open("r+b") as file:
            file.seek(offset)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def is_blank(self) -> bool:
        """Whether it reads as zeroes throughout; holes of the image are not read."""
        zeroes = bytes(MIB)
        with self.image.open("rb") as file:
            position = 0
            while True:
                try:
                    position = file.seek(position, os.SEEK_DATA)
                except OSError:
                    return True
                block = file.read(MIB)
                if block != zeroes[: len(block)]:
                    return False
                position += len(block)


@dataclass
class Disks:
    """Makes loop devices and mounts below one directory, and undoes them all."""

    directory: Path
    loops: list[str] = field(default_factory=list)

    def disk(self, name: str, size: int = 16 * MIB, data: bytes = b"") -> Disk:
        image = self.directory / f"{name}.img"
        with image.open("wb") as file:
            file.truncate(size)
            file.write(data)
        return self.attach(image)

    def attach(self, image: Path, *options: str) -> Disk:
        path = sh("losetup", "--find", "--show", *options, str(image))
        self.loops.append(path)
        return Disk(image, path)

    def detach(self, disk: Disk) -> None:
        sh("losetup", "--detach", disk.path)
        self.loops.remove(disk.path)

    def mount(self, target: Path, *argv: str) -> Path:
        target.mkdir(exist_ok=True)
        sh("mount", *argv, str(target))
        return target

    def close(self) -> None:
        for _ in range(64):
            table = Path("/proc/self/mountinfo").read_text().splitlines()
            points = [line.split()[4].encode().decode("unicode_escape") for line in table]
            ours = [point for point in points if point.startswith(f"{self.directory}/")]
            if not ours:
                break
            subprocess.run(["umount", "--lazy", ours[-1]], check=False)
        for loop in self.loops:
            subprocess.run(["partx", "--delete", loop], check=False, capture_output=True)
            subprocess.run(["losetup", "--detach", loop], check=False)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    if os.geteuid() != 0:
        pytest.skip("loop devices and mounts need root")
    made = Disks(tmp_path)
    try:
        yield made
    finally:
        made.close()
