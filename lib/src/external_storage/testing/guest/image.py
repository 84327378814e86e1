"""The image of the guest: what it is made of, where it is kept, when it is built.

It is kept in the user's cache directory: the Debian packages by their list, the file systems by
that and by the files beside this module, a started machine by all of it, by its size and by the
version of QEMU. Building all takes one to three minutes, and root; using it does not.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from external_storage.testing.binaries import cache_home
from external_storage.testing.guest.errors import GuestError

SUITE: Final = "bookworm"
PYTHON: Final = "3.11"
"""The Python of that Debian."""
PACKAGES: Final = (
    *("busybox-static", "dbus", "iproute2", "kmod", "openssh-server", "procps", "psmisc", "udev"),
    *("nfs-common", "nfs-kernel-server", "rpcbind", "nfs-ganesha", "nfs-ganesha-vfs"),
    *("open-iscsi", "python3-rtslib-fb", "targetcli-fb"),
    *("lvm2", "thin-provisioning-tools", "dmsetup", "fdisk", "gdisk", "util-linux-extra"),
    *("e2fsprogs", "xfsprogs", "btrfs-progs", "quota", "acl", "attr"),
    *("containerd", "runc", "containernetworking-plugins", "iptables"),
    *("python3", "strace"),
)
FILES: Final = Path(__file__).parent / "files"
"""What the image has of our own, and what builds it."""

_PROGRAMS: Final = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "tar": "tar",
}
RUN_PROGRAMS: Final = ("qemu-system-x86_64", "qemu-img", "ssh", "tar")
"""What has to be here to run a guest; Debian calls their packages by other names."""
BUILD_PROGRAMS: Final = ("mmdebstrap", "mke2fs", "ssh-keygen", "tar")


_KEPT_S: Final = 14 * 86400.0
"""Other versions of the same: whoever goes to and fro between two must not build each time."""
_PARTIAL_KEPT_S: Final = 86400.0


@dataclass(frozen=True, slots=True)
class Image:
    """The files of a guest that has never run."""

    directory: Path

    @property
    def root(self) -> Path:
        """The root file system, raw."""
        return self.directory / "root.ext4"

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initramfs(self) -> Path:
        return self.directory / "initramfs"

    @property
    def key(self) -> Path:
        """The private key that root of the guest lets in."""
        return self.directory / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        """The guest's own key, as ssh's file of them, for the host name ``guest``."""
        return self.directory / "known_hosts"


def packages_file() -> Path:
    """Where the installed packages are kept, a tar file; it is there only when complete."""
    content = "\n".join((SUITE, *PACKAGES, (FILES / "kernel-hook").read_text(encoding="utf-8")))
    return _home() / f"packages-{digest(content.encode())}.tar"


def image() -> Image:
    """Where the image of this version is; ``ensure_image`` makes sure that it is."""
    files = sorted((path for path in FILES.iterdir() if path.is_file()), key=lambda path: path.name)
    content = [packages_file().name.encode()]
    for path in (*files, Path(__file__).with_name("build.py")):
        content += [path.name.encode(), path.read_bytes()]
    return Image(_home() / f"image-{digest(b''.join(content))}")


def ensure_image() -> Image:
    """The image, built now if need be, which is told on standard error.

    Raises ``GuestError`` when it cannot be built. Two processes do not build at once.
    """
    found = image()
    if not found.directory.is_dir():
        from external_storage.testing.guest.build import build  # nearly no run needs it

        with building(found.directory) as wanted:
            if wanted:
                build(found, packages_file())
    for used in (found.directory, packages_file()):
        with contextlib.suppress(OSError):  # another user's, or not there any more
            os.utime(used)
    return found


def need(programs: Sequence[str]) -> None:
    """Raise ``GuestError`` with the Debian packages of those ``programs`` that are not here."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        packages = sorted({_PROGRAMS[name] for name in missing})
        raise GuestError(
            f"a guest needs {', '.join(missing)}; on Debian: "
            f"apt-get install --no-install-recommends {' '.join(packages)}"
        )


@contextlib.contextmanager
def building(target: Path) -> Iterator[bool]:
    """Hold the lock for building ``target``; gives whether it is still to be built."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is building it; waiting for that")
            fcntl.flock(file, fcntl.LOCK_EX)
        wanted = not target.exists()
        yield wanted
        if wanted:
            prune(target)


def prune(made: Path) -> None:
    """Remove what is of the same kind as ``made``, of other versions, and was not used for long;
    and what builds that were ended have left."""
    kind, now = made.name.rpartition("-")[0], time.time()
    for path in made.parent.iterdir():
        if path == made or path.suffix == ".lock" or path.name.rpartition("-")[0] != kind:
            continue
        kept_s = _PARTIAL_KEPT_S if path.suffix == ".partial" else _KEPT_S
        if now - path.stat().st_mtime > kept_s:
            say(f"removing {path.name}, which nobody has used for {kept_s / 86400:.0f} days")
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def say(text: str) -> None:
    """Tell people, on standard error, what takes so long."""
    print(f"guest: {text}", file=sys.stderr, flush=True)


def do(argv: Sequence[str | Path], *, cwd: Path | None = None) -> str:
    """Run a program of the host; its standard output. Raises ``GuestError`` when it fails."""
    done = subprocess.run(
        argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        words = " ".join(str(word) for word in argv[:3])
        raise GuestError(f"{words} … exited with {done.returncode}: {done.stderr.strip()[-2048:]}")
    return done.stdout


def digest(content: bytes) -> str:
    """A name for a content."""
    return hashlib.sha256(content).hexdigest()[:12]


def _home() -> Path:
    return cache_home() / "guest"
