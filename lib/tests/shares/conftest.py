"""Shares on real mounts: a tmpfs can be given the source of an NFS mount, the rest is the same."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from external_storage import Owner, mountinfo
from external_storage.shares import Expected, Share, ShareDirectories
from external_storage.testing import builders

LIMIT_S = 60.0
SERVER = "files.example.com"
OURS = Owner("cluster-1", ("example.com/test", "example.com/formerly"))


@dataclass
class Export:
    """A mounted directory of a server that is not there."""

    point: Path
    path: str
    stack: ExitStack
    fs_type: str = "tmpfs"

    @property
    def source(self) -> str:
        return f"{SERVER}:{self.path}"

    def mount(self) -> None:
        run("mount", "-t", "tmpfs", "-o", "size=200m,nr_inodes=200k", self.source, self.point)

    def unmount(self) -> None:
        run("umount", "-l", self.point)

    def share(self, name: str = "files", **options: Any) -> Share:
        """Not started; stopped at the end of the test."""
        options.setdefault("expected", Expected(source=self.source, fs_types=frozenset({"tmpfs"})))
        options.setdefault("call_limit_s", LIMIT_S)
        options.setdefault("mount_point", self.point)
        share = Share(name, server=SERVER, path=self.path, **options)
        self.stack.callback(share.stop)
        return share

    def directories(self, name: str = "files", **options: Any) -> ShareDirectories:
        """Started, and found in order."""
        owner = options.pop("owner", OURS)
        pace = {key: options.pop(key) for key in ("removals_per_s",) if key in options}
        made = ShareDirectories(self.share(name, **options), owner=lambda: owner, **pace)
        self.stack.callback(made.stop)
        made.start()
        until(lambda: made.problem() is None, "the share is available")
        return made


def run(*arguments: str | Path) -> None:
    subprocess.run([str(part) for part in arguments], check=True, timeout=LIMIT_S)


def until(met: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while True:
        if result := met():
            return result
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {LIMIT_S:.0f} s")
        time.sleep(0.01)


def claim(uid: str = "uid-1", name: str = "data") -> Any:
    return builders.claim(uid=uid, name=name)


IN_WORKER = """
import os, signal
from external_storage.shares import making

def pid(site):
    return os.getpid()

def hang(site):
    os.kill(os.getpid(), signal.SIGSTOP)

def fail(site, number):
    raise OSError(number, os.strerror(number), ".snapshot")

def look_below_a_file(site):
    (site.base / "file").touch()
    return making.look(site, ("file", "below"))
"""


@pytest.fixture(autouse=True)
def in_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Functions for ``Share.call``, in a module that the process can import, unlike a test's.

    For every test: a process that runs already knows no path that is added later.
    """
    place = tmp_path / "in_worker"
    place.mkdir()
    (place / "share_helpers.py").write_text(IN_WORKER)
    monkeypatch.syspath_prepend(place)
    yield importlib.import_module("share_helpers")
    del sys.modules["share_helpers"]


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Export]:
    """A tmpfs that says it is the server's; gone at the end."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    point = tmp_path / "share"
    point.mkdir()
    with ExitStack() as stack:
        made = Export(point=point, path="/exports/data", stack=stack)
        made.mount()
        stack.callback(subprocess.run, ["umount", "-l", str(point)], check=False, timeout=LIMIT_S)
        yield made


@pytest.fixture
def directories(export: Export) -> ShareDirectories:
    return export.directories()


THAW_AT_END = """
import fcntl, os, sys
directory = os.open(sys.argv[1], os.O_RDONLY)
fcntl.ioctl(directory, 0xC0045877, 0)
print("frozen", flush=True)
sys.stdin.read()
fcntl.ioctl(directory, 0xC0045878, 0)
"""


@dataclass
class Disk(Export):
    """A file system that can be made to hang: writes sleep in the kernel, and cannot be killed."""

    holder: subprocess.Popen[bytes] | None = None

    def mount(self) -> None:
        image = self.point.with_suffix(".image")
        if not image.exists():
            with image.open("wb") as file:
                file.truncate(16 << 20)
            run("mkfs.ext4", "-q", image)
        run("mount", "-o", "loop", image, self.point)

    def share(self, name: str = "disk", **options: Any) -> Share:
        mount = mountinfo.find(self.point)
        expected = Expected(source=mount.source, fs_types=frozenset({"ext4"}))
        return super().share(name, expected=expected, **options)

    def freeze(self) -> None:
        # Thawed by a process of its own at its end of input, so also when we are killed.
        command = [sys.executable, "-c", THAW_AT_END, str(self.point)]
        self.holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == b"frozen\n"

    def thaw(self) -> None:
        if self.holder is not None:
            self.holder.communicate(timeout=LIMIT_S)
            self.holder = None


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mounted, and thawed at the end."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount and freeze a file system")
    point = tmp_path / "disk"
    point.mkdir()
    with ExitStack() as stack:
        made = Disk(point=point, path="/disk", stack=stack)
        try:
            made.mount()
        except subprocess.CalledProcessError:
            pytest.skip("no loop device to be had")
        stack.callback(subprocess.run, ["umount", "-l", str(point)], check=False, timeout=LIMIT_S)
        # Thawed before the shares are stopped, which is last in, first out.
        with ExitStack() as frozen:
            frozen.callback(made.thaw)
            yield made
