"""A real NFS-Ganesha with a real dbus-daemon per test, and real NFS clients (libnfs)."""

from __future__ import annotations

import contextlib
import ctypes.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nfs_provisioner.directories import VolumeDirectories
from nfs_provisioner.export_files import Export, ExportFiles
from nfs_provisioner.export_ids import ExportIds
from nfs_provisioner.exportmgr import ExportManager
from nfs_provisioner.exports import Exports
from nfs_provisioner.ganesha import Ganesha
from nfs_provisioner.ganesha_config import GaneshaConfig

_NEEDED = {
    "ganesha.nfsd": "nfs-ganesha nfs-ganesha-vfs",
    "dbus-daemon": "dbus-daemon",
    "nfs-cp": "libnfs-utils",
    "setpriv": "util-linux",
}
_DEADLINE_S = 60.0


def _wait_until(condition: Callable[[], object], *, what: str) -> None:
    """Poll until ``condition`` holds; a generous deadline costs nothing unless it is missed."""
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {_DEADLINE_S:g} s: {what}")
        time.sleep(0.01)


@pytest.fixture
def wait_until() -> Callable[..., None]:
    return _wait_until


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory with a short path (unix sockets live below it), as an export root is."""
    path = Path(tempfile.mkdtemp(prefix="nfsp-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Server:
    """One export root with its server and everything that works on it."""

    root: Path
    config: GaneshaConfig
    restarted: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directories = VolumeDirectories(self.root, self.config.state_dir)
        self.files = ExportFiles(self.config.state_dir)
        self.ids = ExportIds()
        self.manager = ExportManager(self.config.bus_address)
        self.exports = Exports(self.root, files=self.files, manager=self.manager, ids=self.ids)
        self.ganesha = Ganesha(
            self.config,
            before_start=self.files.load,
            on_restart=lambda: self.restarted.append(time.monotonic()),
        )

    def prepare(self) -> None:
        self.directories.prepare()
        self.files.prepare()

    def volume(self, name: str) -> Export:
        """A directory anybody may write to, exported."""
        self.directories.create(name, mode=0o777, gid=None)
        export = self.exports.describe(name, self.ids.allocate(name))
        self.exports.publish(export)
        return export

    def url(self, path: str) -> str:
        return f"nfs://127.0.0.1{path}?nfsport={self.config.port}&version=4"

    def put(self, path: str, text: str) -> None:
        """Write a small file with a client of its own."""
        source = self.root / "put.txt"
        source.write_text(text)
        _run_libnfs("nfs-cp", str(source), self.url(path))

    def get(self, path: str) -> str:
        return _run_libnfs("nfs-cat", self.url(path)).stdout

    def can_list(self, path: str) -> bool:
        return _run_libnfs("nfs-ls", self.url(path), check=False).returncode == 0

    def processes(self) -> list[int]:
        """Every process that was started for this root, found by its command line."""
        return _processes_with(str(self.config.run_dir))


def _run_libnfs(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a libnfs tool. NFS4ERR_GRACE means "ask again": the kernel's client does so by
    itself, libnfs leaves it to its caller."""
    deadline = time.monotonic() + _DEADLINE_S
    while True:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if "NFS4ERR_GRACE" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    if check:
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


@pytest.fixture
def libnfs() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a client of a moment: ``libnfs("nfs-cat", url)``."""
    return _run_libnfs


def _processes_with(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended since
                if text.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


@pytest.fixture
def needs_ganesha() -> None:
    if os.geteuid() != 0:
        pytest.skip("NFS-Ganesha opens files by handle, which takes root")
    for program, packages in _NEEDED.items():
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: apt-get install {packages}")


@pytest.fixture
def stopped_server(needs_ganesha: None, root: Path, free_port: int) -> Iterator[Server]:
    """All prepared, not started; whatever a test leaves running is stopped."""
    config = GaneshaConfig(
        state_dir=root / ".state",
        run_dir=root / "run",
        port=free_port,
        bind_address="127.0.0.1",
        grace_period_s=2,
        lease_lifetime_s=2,
    )
    server = Server(root, config)
    server.prepare()
    yield server
    server.manager.close()
    server.ganesha.stop()
    for pid in server.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def server(stopped_server: Server) -> Server:
    stopped_server.ganesha.start()
    return stopped_server


class NfsFile:
    """An NFS client that stays connected, with one open file (libnfs through ctypes).

    libnfs 4.0 writes at most about 3.9 kB a call over NFSv4.
    """

    def __init__(self, library: ctypes.CDLL, url: str) -> None:
        self._lib = library
        self._context = ctypes.c_void_p(library.nfs_init_context())
        parsed = library.nfs_parse_url_full(self._context, url.encode())
        assert parsed, self._error()
        server, path, file = ctypes.cast(parsed, ctypes.POINTER(ctypes.c_char_p))[0:3]
        self._check(library.nfs_mount(self._context, server, path))
        self._file = ctypes.c_void_p()
        flags = os.O_CREAT | os.O_RDWR
        self._check(library.nfs_open2(self._context, file, flags, 0o666, ctypes.byref(self._file)))

    def write(self, offset: int, data: bytes) -> None:
        done = self._lib.nfs_pwrite(
            self._context, self._file, ctypes.c_uint64(offset), ctypes.c_uint64(len(data)), data
        )
        self._check(done)
        assert done == len(data)

    def read(self, offset: int, length: int) -> bytes:
        buffer = ctypes.create_string_buffer(length)
        done = self._lib.nfs_pread(
            self._context, self._file, ctypes.c_uint64(offset), ctypes.c_uint64(length), buffer
        )
        self._check(done)
        return buffer.raw[:done]

    def close(self) -> None:
        self._lib.nfs_close(self._context, self._file)
        self._lib.nfs_destroy_context(self._context)

    def _check(self, result: int) -> None:
        if result < 0:
            raise OSError(-result, self._error())

    def _error(self) -> str:
        text = self._lib.nfs_get_error(self._context)
        return text.decode() if text else "no message"


@pytest.fixture
def open_nfs_file() -> Iterator[Callable[[str], NfsFile]]:
    name = ctypes.util.find_library("nfs")
    if name is None:
        pytest.skip("libnfs is not installed: apt-get install libnfs-utils")
    library = ctypes.CDLL(name)
    for function in ("nfs_init_context", "nfs_parse_url_full"):
        getattr(library, function).restype = ctypes.c_void_p
    library.nfs_get_error.restype = ctypes.c_char_p
    files: list[NfsFile] = []

    def opened(url: str) -> NfsFile:
        files.append(NfsFile(library, url))
        return files[-1]

    yield opened
    for file in files:
        file.close()
