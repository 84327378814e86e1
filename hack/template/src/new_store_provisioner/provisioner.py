"""Volumes as directories of one file system: a back end that works, as a place to begin.

REPLACE marks what belongs to directories. What stays with most back ends: the asset is named by its
volume; its record is written before it is made; every step finds out by itself whether it has been
done before, because it is called again after a crash. What else a provisioner can say and do
(``expand``, ``check``, ``reconcile``, block volumes ...) is in ``external_storage.Provisioner``.
"""

from __future__ import annotations

from external_storage import (
    AssetRecord,
    AssetRecords,
    CannotStart,
    PersistentVolume,
    ProvisionedVolume,
    Provisioner,
    ProvisioningFailed,
    ProvisionRequest,
)
from external_storage.confine import Confined
from new_store_provisioner.settings import NewStoreParameters, NewStoreSettings


class NewStoreProvisioner(Provisioner[NewStoreSettings, NewStoreParameters]):
    """Makes volumes as directories below one root."""

    records: AssetRecords

    def start(self) -> None:
        root = self.settings.volume_root
        try:
            # REPLACE: connect to the back end. The root is not made here: that would hide a disk
            # that is not mounted.
            self._volumes = Confined(root)
            # A back end without a place for records beside its assets declares `durable_intent`
            # instead, and has no `discard`.
            self.records = AssetRecords(root / ".state" / "volumes")
        except OSError as error:
            raise CannotStart(f"--volume-root {root}: {_reason(error)}") from error

    def stop(self) -> None:
        self._volumes.close()

    def provision(self, request: ProvisionRequest[NewStoreParameters]) -> ProvisionedVolume:
        name, gid = request.volume_name, request.parameters.gid
        if self.records.get(name) is None:
            self.records.begin(name, claim=request.claim)
        try:
            self._make(name, gid)
        except OSError as error:
            # What may be left has its record: the next try goes on from it, and if the claim goes,
            # the library has it discarded.
            raise ProvisioningFailed(f"no directory can be made: {_reason(error)}") from error
        # "Directory": on a node without it a pod waits, instead of writing into one made there.
        return ProvisionedVolume(
            source={"hostPath": {"path": self._path(name), "type": "Directory"}}, gid=gid
        )

    def delete(self, volume: PersistentVolume) -> None:
        found = volume.spec.host_path.path if volume.spec.host_path is not None else "none"
        if found != self._path(volume.name):
            # The root is another one now, or somebody else wrote this volume: what is not there
            # counts as deleted, so we must be sure to look in the right place.
            raise ProvisioningFailed(
                f"the volume's path {found} is not {self._path(volume.name)}: nothing is removed"
            )
        self._remove(volume.name)

    def discard(self, record: AssetRecord) -> None:
        self._remove(record.name)

    # -- REPLACE: the back end

    def _path(self, name: str) -> str:
        return str(self.settings.volume_root / name)

    def _make(self, name: str, gid: int | None) -> None:
        mode, group = (0o2777, -1) if gid is None else (0o2770, gid)
        if not self._volumes.mkdir(name, mode=mode, gid=group, exist_ok=True):
            # Made by an earlier call, which may have been killed before it came to these.
            self._volumes.chown(name, gid=group)
            self._volumes.chmod(name, mode)

    def _remove(self, name: str) -> None:
        try:
            gone = self._volumes.remove_tree(name, stop=lambda: self.deadline.expired)
        except OSError as error:
            raise ProvisioningFailed(f"cannot be removed: {_reason(error)}") from error
        if not gone:
            raise ProvisioningFailed("not all files could be removed in time, to be continued")
        self.records.forget(name)


def _reason(error: OSError) -> str:
    """Without paths of ours: users read it in an event."""
    return error.strerror or str(error)
