"""What an admin sets on efs-provisioner."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from efs_provisioner import file_systems, tags
from efs_provisioner.file_systems import FileSystems
from external_storage import Seconds, Settings

CSI_DRIVER: Final = "efs.csi.aws.com"


class EfsSettings(Settings):
    """Flags and environment, beside those of every provisioner."""

    file_system_id: str = ""
    """Id of the file system that volumes are made on; several are separated by commas. What else is
    to be said of them is in the file of `--file-systems`."""

    aws_region: str = ""
    """Region of the file systems; without it boto3's own way to find it."""

    dns_name: str = ""
    """Name or address of the file system's server, put into volumes in place of the name that AWS
    gives it; for one file system."""

    file_systems: Path | None = None
    """YAML file of several file systems, in place of `--file-system-id`."""

    cluster: str = ""
    """Name of this cluster in tags and tokens of access points, unique in the AWS account; by
    default the UID of the namespace kube-system. It must never change."""

    tags: str = ""
    """Tags of every access point, `key:value key2:value2`; those of a class come on top."""

    delete_access_point_root_dir: bool = False
    """Remove the directory of a deleted access point too, for classes without `onDelete`; needs the
    file system mounted in our pod."""

    archive_retention: Seconds | None = None
    """Age at which archived directories are removed; `none`: never."""

    call_timeout: Seconds = Seconds(30.0)
    """How long one step on a mounted file system may take before its process is killed and the file
    system counts as hung; below `--timeout`."""

    def validate(self) -> Iterable[str]:
        yield from super().validate()
        if CSI_DRIVER in self.names:
            yield (
                f"--provisioner-name: {CSI_DRIVER} is the CSI driver's own name: both would make "
                "volumes for the same claims; choose another one"
            )
        if (self.file_systems is None) == (not self.file_system_id):
            yield "--file-system-id: give either it (FILE_SYSTEM_ID) or --file-systems"
        elif self.file_systems is not None:
            for problem in file_systems.read(self.file_systems)[1]:
                yield f"--file-systems: {problem}"
        else:
            for problem in file_systems.problems_of(self.read_file_systems()):
                yield f"--file-system-id: {problem}"
        if self.dns_name and (self.file_systems is not None or "," in self.file_system_id):
            yield "--dns-name: is for one file system; say dnsName in the file of --file-systems"
        try:
            tags.parse(self.tags)
        except ValueError as error:
            yield f"--tags: {error}"
        if self.archive_retention is not None and self.archive_retention <= 0:
            yield "--archive-retention: must be above 0, or none"
        if not 0 < self.call_timeout < self.timeout:
            yield f"--call-timeout: must be above 0 and below --timeout, {self.timeout:g} s"

    def read_file_systems(self) -> FileSystems:
        """The file systems of the settings, which have been checked."""
        if self.file_systems is not None:
            return file_systems.read(self.file_systems)[0]
        return file_systems.only(self.file_system_id, dns_name=self.dns_name)
