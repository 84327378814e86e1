"""What a machine must have for a cluster; all that is missing is told at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from external_storage import mountinfo
from external_storage.testing.access import ControlPlaneError

CNI_PROGRAMS: Final = Path("/usr/lib/cni")
_PACKAGES: Final[Mapping[str, str]] = {
    "busybox": "busybox-static",
    "containerd": "containerd",
    "containerd-shim-runc-v2": "containerd",
    "ctr": "containerd",
    "ip": "iproute2",
    "losetup": "mount",
    "mount": "mount",
    "nft": "nftables",
    "nsenter": "util-linux",
    "runc": "runc",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    f"{CNI_PROGRAMS}/bridge": "containernetworking-plugins",
    f"{CNI_PROGRAMS}/host-local": "containernetworking-plugins",
}
# Images unpacked, etcd, logs: a run with every provisioner's image needs about this much.
_FREE_MIB: Final = 2048


class ClusterError(ControlPlaneError):
    """The cluster could not be started, or did not do what the test itself asked of it."""


def check(directory: Path) -> None:
    """Raise ``ClusterError`` with everything that is missing; ``directory`` will hold the state."""
    problems = []
    if os.geteuid() != 0:
        problems.append(f"it must be run as root, not as user {os.geteuid()}")
    missing = [name for name in _PACKAGES if find(name) is None]
    if missing:
        packages = sorted({_PACKAGES[name] for name in missing})
        problems.append(
            f"these programs are missing: {', '.join(missing)}; run: apt-get install "
            f"--no-install-recommends {' '.join(packages)}"
        )
    free = shutil.disk_usage(directory).free >> 20
    if free < _FREE_MIB:
        problems.append(f"{directory} has {free} MiB free; {_FREE_MIB} MiB are needed")
    if mountinfo.find(directory).fs_type == "overlay":
        # containerd makes its containers as overlays, which cannot lie upon another.
        problems.append(
            f"{directory} is on an overlay file system; set TMPDIR to a directory that is not"
        )
    if problems:
        raise ClusterError("no cluster can run here: " + "; ".join(problems))


def find(name: str) -> str | None:
    """The path of a program, also when an ordinary user's ``PATH`` leaves it out."""
    path = os.environ.get("PATH", os.defpath)
    return shutil.which(name, path=f"{path}:/usr/sbin:/sbin")
