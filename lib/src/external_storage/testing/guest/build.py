"""Building the image of the guest from Debian packages."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from external_storage.testing.guest.errors import GuestError
from external_storage.testing.guest.image import (
    BUILD_PROGRAMS,
    FILES,
    PACKAGES,
    SUITE,
    Image,
    building,
    do,
    need,
    say,
)
from external_storage.testing.processes import die_with_parent

# Sparse: it takes what is in it, and tests may put a few container images beside that.
_ROOT_BYTES: Final = 6 * 1024**3
_MODULES: Final = (
    *("virtio/virtio_ring", "virtio/virtio", "virtio/virtio_pci_legacy_dev"),
    *("virtio/virtio_pci_modern_dev", "virtio/virtio_pci", "block/virtio_blk"),
)
_UNUSED: Final = ("man", "doc", "locale", "info")


def build(image: Image, packages: Path) -> None:
    """Build ``image``, from the tar file ``packages``, which is made first where it is missing.

    The caller holds the image's lock. Raises ``GuestError`` without root, or with what a step has
    printed.
    """
    need(BUILD_PROGRAMS)
    if os.geteuid() != 0:
        raise GuestError(
            "building the guest's image needs root, which may make device files; once, as root "
            f"with this user's HOME: hack/guest --build (the image is kept in {image.directory})"
        )
    with building(packages) as wanted:
        if wanted:
            _install_packages(packages)
    say("making its file systems")
    # Beside the target, for the rename; an interrupted build's is cleared by the next one.
    partial = image.directory.with_name(f"{image.directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    root = partial / "root"
    root.mkdir(parents=True)
    do(["tar", "-x", "-C", root, "-f", packages])
    made = Image(partial)
    _make_keys(made, root)
    _configure(root)
    (root / "boot/vmlinuz").rename(made.kernel)
    _make_initramfs(made.initramfs, root)
    do(
        [
            *("mke2fs", "-q", "-t", "ext4", "-L", "guest", "-m", "0", "-J", "size=16"),
            *("-E", "lazy_itable_init=1,lazy_journal_init=1"),
            *("-d", root, made.root, f"{_ROOT_BYTES // 1024**2}M"),
        ]
    )
    shutil.rmtree(root)
    partial.rename(image.directory)


def _install_packages(target: Path) -> None:
    say(f"installing {len(PACKAGES)} Debian packages and a kernel; 1 to 2 minutes, only this once")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "tmp").mkdir(parents=True)
    _in_namespace(
        [
            *("mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}"),
            *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _UNUSED),
            f"--customize-hook={FILES / 'kernel-hook'}",
            *(SUITE, str(partial / "packages.tar")),
        ],
        tmp=partial / "tmp",
    )
    (partial / "packages.tar").rename(target)
    shutil.rmtree(partial)


def _in_namespace(argv: Sequence[str], *, tmp: Path) -> None:
    """Run it so that neither a process nor a mount of it is left, however it ends.

    mmdebstrap binds /dev and /sys into its directory: after a SIGKILL, clearing that away in the
    next run would otherwise empty the host's.
    """
    unshare = ("unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
    process = subprocess.Popen(
        die_with_parent([*unshare, *argv]),
        env={**os.environ, "TMPDIR": str(tmp)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        output, _ = process.communicate()
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        raise GuestError(f"{argv[0]} exited with {process.returncode}: {output.strip()[-2048:]}")


def _make_keys(image: Image, root: Path) -> None:
    """One pair lets us in, the other tells us who answers; both are made here, and only here."""
    host = image.directory / "host_ed25519"
    for key in (image.key, host):
        do(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key.name, "-f", key])
    kind, public = host.with_suffix(".pub").read_text(encoding="ascii").split()[:2]
    image.known_hosts.write_text(f"guest {kind} {public}\n", encoding="ascii")
    for path in (root / "etc/ssh").glob("ssh_host_*"):
        path.unlink()
    host.rename(root / "etc/ssh/ssh_host_ed25519_key")
    host.with_suffix(".pub").rename(root / "etc/ssh/ssh_host_ed25519_key.pub")
    (root / "root/.ssh").mkdir(mode=0o700)
    image.key.with_suffix(".pub").rename(root / "root/.ssh/authorized_keys")


def _configure(root: Path) -> None:
    binaries = root / "usr/local/sbin"
    for name in ("guest-up", "guest-awake", "guest-serve-nfs", "guest-down"):
        shutil.copy(FILES / name, binaries / name)
    (binaries / "init").symlink_to("/bin/busybox")
    shutil.copy(FILES / "inittab", root / "etc/inittab")
    shutil.copy(FILES / "sshd.conf", root / "etc/ssh/sshd_config.d/guest.conf")
    # rtslib keeps its state there; the kernel module looks when it is loaded.
    for directory in ("etc/target", "var/lib/nfs/rpc_pipefs", "var/lib/nfs/v4recovery"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    texts = {
        "etc/hostname": "guest\n",
        "etc/hosts": "127.0.0.1 localhost guest\n",
        # Refused at once: a name server that does not answer would cost seconds a question.
        "etc/resolv.conf": "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
        "etc/fstab": "",
        "etc/iscsi/initiatorname.iscsi": "InitiatorName=iqn.2024-01.test.external-storage:guest\n",
        "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
        "var/lib/nfs/etab": "",
        "var/lib/nfs/rmtab": "",
    }
    for name, text in texts.items():
        (root / name).unlink(missing_ok=True)  # it may be a link
        (root / name).write_text(text, encoding="ascii")
    (root / "etc/mtab").unlink(missing_ok=True)
    (root / "etc/mtab").symlink_to("/proc/self/mounts")


def _make_initramfs(target: Path, root: Path) -> None:
    tree = target.with_name("initramfs.d")
    for name in ("bin", "modules", "proc", "sys", "dev", "root"):
        (tree / name).mkdir(parents=True)
    busybox = root / "usr/bin/busybox"
    shutil.copy(busybox, tree / "bin/busybox")
    shutil.copy(FILES / "initramfs-init", tree / "init")
    kernels = list((root / "usr/lib/modules").iterdir())
    if len(kernels) != 1:
        raise GuestError(f"one kernel was to be installed, there are {len(kernels)}")
    for name in _MODULES:
        shutil.copy(kernels[0] / "kernel/drivers" / f"{name}.ko", tree / "modules")
    pack = 'find . | "$1" cpio -o -H newc >"$2"'
    do(["sh", "-c", pack, "sh", busybox, target], cwd=tree)
    shutil.rmtree(tree)
