"""A QEMU guest as the cluster's second node, for volumes that need a storage kernel."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from external_storage.testing.certificates import CertificateAuthority
from external_storage.testing.cluster import layout
from external_storage.testing.cluster.nodefiles import node_files
from external_storage.testing.cluster.requirements import CNI_PROGRAMS
from external_storage.testing.guest import Guest
from external_storage.testing.processes import ProcessGroup

_DISK_MIB: Final = 4096
_PLACE: Final = "/opt/node"
_LOAD_LIMIT_S: Final = 600.0
# Everything is at hand before the kubelet is started: the first pods should not wait for a module.
_MODULES: Final = "overlay bridge veth"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFiles:
    """What the guest gets from the cluster."""

    server: str
    """The address of the API server on the nodes' network."""
    authority: CertificateAuthority
    kubelet: Path
    images: Sequence[Path]
    """Archives of images that it has from the beginning."""


class GuestNode:
    """Joins a started guest, which has a tap device on the nodes' bridge, to the cluster."""

    def __init__(self, guest: Guest, files: NodeFiles, *, directory: Path) -> None:
        """``directory`` is ours, and there."""
        self.guest = guest
        self._files = files
        self._directory = directory

    def join(self) -> None:
        """Give it all that a node has and start that; the API server hears of it a little later.

        Raises ``GuestError`` or ``CalledProcessError`` with the words of the step that failed.
        """
        disk = self.guest.add_disk(image=self._make_disk())
        device = self.guest.path(disk)
        script = f"""
            set -e
            mkdir -p {_PLACE} /var/lib/containerd /etc/containerd /etc/cni/net.d
            mount {device} {_PLACE}
            mount --bind {_PLACE}/containerd /var/lib/containerd
            mount --make-rshared /
            cp {_PLACE}/config.toml /etc/containerd/
            cp {_PLACE}/10-pods.conflist /etc/cni/net.d/
            modprobe -a {_MODULES}
            sysctl -qw net.ipv4.ip_forward=1
            test -e {CNI_PROGRAMS}/bridge
        """
        self.guest.run(script, timeout_s=120)
        self.start()

    def start(self) -> None:
        """Start containerd and the kubelet; also again after they were killed."""
        self.guest.popen(["containerd"])
        self.guest.run(
            "tries=0; until ctr version >/dev/null 2>&1; do sleep 0.2; tries=$((tries + 1)); "
            "test $tries -lt 300; done",
            timeout_s=120,
        )
        self.guest.popen(
            [
                f"{_PLACE}/kubelet",
                *("--config", f"{_PLACE}/kubelet.json"),
                *("--kubeconfig", f"{_PLACE}/kubelet.kubeconfig"),
                *("--hostname-override", layout.GUEST, "--node-ip", layout.GUEST_ADDRESS),
            ]
        )

    def load_image(self, archive: Path) -> None:
        """Load images while it runs, which is slow there: an emulated processor unpacks them."""
        target = f"{_PLACE}/image.tar"
        self.guest.put(archive, target, timeout_s=_LOAD_LIMIT_S)
        command = f"ctr --namespace k8s.io images import {target} && rm {target}"
        self.guest.run(command, timeout_s=_LOAD_LIMIT_S)

    def _make_disk(self) -> Path:
        """A disk with programs, configuration and unpacked images: copying them in takes longer."""
        tree = self._directory / "tree"
        (tree / "containerd").mkdir(parents=True)
        shutil.copy(self._files.kubelet, tree / "kubelet")
        self._write_configuration(tree)
        unpack(self._files.images, root=tree / "containerd", directory=self._directory)
        disk = self._directory / "node.ext4"
        options = ("-q", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1")
        subprocess.run(
            ["mke2fs", *options, "-d", tree, disk, f"{_DISK_MIB}M"], check=True, capture_output=True
        )
        shutil.rmtree(tree)
        return disk

    def _write_configuration(self, tree: Path) -> None:
        files = node_files(
            self._files.authority,
            node=layout.GUEST,
            address=layout.GUEST_ADDRESS,
            place=Path(_PLACE),
            server=self._files.server,
            cgroup_root="/",
        )
        files["config.toml"] = layout.containerd_configuration().encode()
        files["10-pods.conflist"] = layout.pod_network(layout.GUEST_PODS).encode()
        for name, content in files.items():
            (tree / name).write_bytes(content)


def unpack(images: Iterable[Path], *, root: Path, directory: Path) -> None:
    """Unpack archives into a containerd's ``root``, by a containerd that is here for just that."""
    socket = directory / "unpack.sock"
    config = directory / "unpack.toml"
    config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
    processes = ProcessGroup(directory)
    state = directory / "unpack"
    where = ("--root", str(root), "--state", str(state), "--address", str(socket))
    processes.start("unpack", ["containerd", "--config", str(config), *where])
    ctr = ["ctr", "--connect-timeout", "60s", "--address", str(socket)]
    try:
        for archive in images:
            command = [*ctr, "--namespace", "k8s.io", "images", "import", str(archive)]
            subprocess.run(command, check=True, capture_output=True, timeout=_LOAD_LIMIT_S)
    finally:
        processes.stop("unpack", limit_s=30)
        shutil.rmtree(state, ignore_errors=True)
