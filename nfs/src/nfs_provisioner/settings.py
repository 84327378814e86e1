"""What an admin sets on nfs-provisioner, and what a class may say."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from external_storage import Parameters, Settings


class NfsSettings(Settings):
    """Flags and environment of nfs-provisioner, beside those of every provisioner."""

    leader_elect: bool = False
    """Take new claims only while holding the lease of this provisioner name: for several servers
    with one name. Each goes on serving, and deletes its own volumes, without the lease."""

    export_root: Path = Path("/export")
    """Directory that holds the volumes and our state; it must outlive the pod, and be the same
    file system throughout."""

    run_dir: Path = Path("/run/nfs-provisioner")
    """Directory of sockets and pid files; need not outlive the process."""

    server_hostname: str = ""
    """Address put into volumes, which nodes mount from; it cannot be changed later. Without it,
    the cluster IP of --service-name is used."""

    service_name: str = ""
    """Service in our namespace that leads to this pod: its cluster IP is put into volumes."""

    nfs_port: int = 2049
    """TCP port NFS listens on. Volumes get a `port=` mount option unless it is 2049 or the volumes
    go through the Service."""

    bind_address: str = "0.0.0.0"
    """Address NFS listens on."""

    grace_period: int = 90
    """Seconds (0 to 180) after a start in which clients of before may reclaim their locks and
    nobody gets new ones; it ends early once they have."""

    lease_lifetime: int = 60
    """Seconds (1 to 120) after which a silent client loses its locks."""

    def validate(self) -> Iterable[str]:
        yield from super().validate()
        if not self.export_root.is_absolute() or self.export_root == Path("/"):
            yield f"--export-root: {str(self.export_root)!r} is not an absolute directory below /"
        if not self.run_dir.is_absolute():
            yield f"--run-dir: {str(self.run_dir)!r} is not absolute"
        if bool(self.server_hostname) == bool(self.service_name):
            yield "--server-hostname, --service-name: give one of the two"
        if not 1 <= self.nfs_port <= 65535:
            yield f"--nfs-port: {self.nfs_port} is not between 1 and 65535"
        if not 0 <= self.grace_period <= 180:
            yield f"--grace-period: {self.grace_period} is not between 0 and 180"
        if not 1 <= self.lease_lifetime <= 120:
            yield f"--lease-lifetime: {self.lease_lifetime} is not between 1 and 120"


class NfsParameters(Parameters):
    """Parameters of a class of nfs-provisioner."""

    gid: int | None = None
    """Group that owns a volume (mode 2770) and is added to the pods that use it; `none`: writable
    by everybody (mode 2777)."""

    root_squash: bool = False
    """Whether root on a client is taken for nobody."""

    def validate(self) -> Iterable[str]:
        if self.gid is not None and not 1 <= self.gid < 2**32 - 1:
            yield f"parameter 'gid': {self.gid} is not 'none' or a group id from 1 to {2**32 - 2}"
