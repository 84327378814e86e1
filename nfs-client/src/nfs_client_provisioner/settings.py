"""What an admin sets on nfs-client-provisioner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from external_storage import Seconds, Settings
from nfs_client_provisioner.servers import (
    MOUNT_POINT,
    Server,
    host_problem,
    mount_point_problem,
    only_server,
    path_problem,
    read_servers,
)


class NfsClientSettings(Settings):
    """Flags and environment, beside those of every provisioner."""

    nfs_server: str = ""
    """Address of the NFS server, put into volumes: nodes mount from it. With `--nfs-path`, for one
    server; several are in the file of `--servers`."""

    nfs_path: str = ""
    """The exported directory of that server that holds the volumes, put into volumes."""

    mount_point: Path = MOUNT_POINT
    """Where that directory is mounted in our pod, by the pod's own `nfs` volume."""

    servers: Path | None = None
    """YAML file of several servers; a class picks one by its parameter `server`."""

    archive_retention: Seconds | None = None
    """Age at which archived directories are removed; `none`: never. A class may set its own."""

    call_timeout: Seconds = Seconds(30.0)
    """How long one step on a share may take before its process is killed and the share counts as
    hung; below `--timeout`."""

    usage_interval: Seconds = Seconds(3600.0)
    """How often the bytes and files of each share's volumes are counted, slowly and behind all
    other work, for the metrics; 0: never."""

    enable_leader_election: bool | None = None
    """The name that nfs-subdir-external-provisioner has for `--leader-elect`."""

    @classmethod
    def from_texts(
        cls, texts: Mapping[str, str], *, called: Mapping[str, str] | None = None
    ) -> Self:
        """As in the base; what was given by a predecessor's name stands in for ours."""
        given = dict(texts)
        if "enable_leader_election" in given:
            given.setdefault("leader_elect", given["enable_leader_election"])
        return super().from_texts(given, called=called)

    def validate(self) -> Iterable[str]:
        yield from super().validate()
        if self.servers is not None:
            if self.nfs_server or self.nfs_path:
                yield "--servers: give either it or --nfs-server and --nfs-path"
            for problem in read_servers(self.servers)[1]:
                yield f"--servers: {problem}"
        else:
            yield from self._only_problems()
        if self.archive_retention is not None and self.archive_retention <= 0:
            yield "--archive-retention: must be above 0, or none"
        if not 0 < self.call_timeout < self.timeout:
            yield f"--call-timeout: must be above 0 and below --timeout, {self.timeout:g} s"

    def _only_problems(self) -> Iterable[str]:
        if not (self.nfs_server and self.nfs_path):
            yield "--nfs-server, --nfs-path: give both (NFS_SERVER, NFS_PATH), or --servers"
        if self.nfs_server and (problem := host_problem(self.nfs_server)):
            yield f"--nfs-server: {problem}"
        if self.nfs_path and (problem := path_problem(self.nfs_path)):
            yield f"--nfs-path: {problem}"
        if problem := mount_point_problem(self.mount_point):
            yield f"--mount-point: {problem}"

    def read_servers(self) -> list[Server]:
        """The servers of the settings, which have been checked."""
        if self.servers is None:
            return [only_server(self.nfs_server, self.nfs_path, self.mount_point)]
        return read_servers(self.servers)[0]
