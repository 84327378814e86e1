"""The directories of access points: removed or archived where the file system is mounted here."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from efs_provisioner.aws import AccessPoint
from efs_provisioner.file_systems import FileSystem
from efs_provisioner.known_volumes import DirectoryTaken
from efs_provisioner.parameters import OnDelete
from external_storage import Infeasible, ProvisioningFailed, get_logger
from external_storage.shares import ShareDirectories, check_path
from external_storage.shares.location import below

log = get_logger(__name__)


class AccessPointDirectories:
    """By way of the mounts that directories as volumes use, too."""

    def __init__(
        self,
        systems: Mapping[str, FileSystem],
        shares: Mapping[str, ShareDirectories],
        *,
        keep_archives_s: float | None,
    ) -> None:
        """``shares``: of the file systems that are mounted in our pod, by id."""
        self._systems = systems
        self._shares = shares
        self._keep_archives_s = keep_archives_s

    def check(self, file_system: str, path: str) -> None:
        """``Infeasible`` unless a directory of this path could be removed later."""
        try:
            self._find(file_system, path)
        except ProvisioningFailed as error:
            raise Infeasible(
                f"{error}: let the class say onDelete: retain, or mount it (--file-systems)"
            ) from error

    def refuse_taken(self, file_system: str, path: str, *, volume: str) -> None:
        """Raise for a path of which an access point would give away, or take along with its end,
        what is others': ``Infeasible``, ``DirectoryTaken``."""
        system, share = self._systems.get(file_system), self._shares.get(file_system)
        if system is None or share is None:
            return
        if path == system.path or below(path, system.path) is not None:
            raise Infeasible(
                f"the directory {path} has in it {system.path}, which is mounted in the "
                "provisioner's pod for everybody's directories: choose one below or beside it"
            )
        relative = below(system.path, path)
        with suppress(ValueError):  # a path that no record could have
            # Also of what was begun before a restart, which no volume shows.
            if relative is not None and (taken := share.records.conflict(volume, relative)):
                raise DirectoryTaken(taken)

    def end(self, volume: str, point: AccessPoint, on_delete: OnDelete) -> None:
        """Remove or archive the root directory; one that nobody ever mounted is not there."""
        share, relative = self._find(point.file_system, point.path)
        if on_delete is OnDelete.ARCHIVE:
            ended = share.archive(volume, path=relative, keep_s=self._keep_archives_s)
        else:
            ended = share.remove(volume, path=relative)
        log.info(
            "the directory of an access point has ended",
            volume=volume,
            path=point.path,
            ending=ended.ending.value,
            place=ended.place,
        )

    def _find(self, file_system: str, path: str) -> tuple[ShareDirectories, str]:
        system, share = self._systems.get(file_system), self._shares.get(file_system)
        if system is None or share is None:
            raise ProvisioningFailed(
                f"the directories of file system {file_system} cannot be reached: it is not "
                "mounted in the provisioner's pod"
            )
        relative = below(system.path, path)
        if relative is None:
            raise ProvisioningFailed(
                f"the directory {path} is not below {system.path}, the part of file system "
                f"{file_system} that is mounted in the provisioner's pod"
            )
        try:
            check_path(relative)
        except ValueError as error:
            raise ProvisioningFailed(str(error)) from error
        return share, relative
