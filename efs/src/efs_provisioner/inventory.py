"""What there is in EFS beside what volumes there are: orphans and what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from efs_provisioner.aws import AccessPoint, Aws
from efs_provisioner.provisioner import owner_of, shares_of
from efs_provisioner.settings import EfsSettings
from efs_provisioner.stored import file_system_of, handle_of
from efs_provisioner.tags import CLAIM_UID, VOLUME
from external_storage import (
    PersistentVolume,
    PersistentVolumeClaim,
    ProvisionerError,
    ProvisioningFailed,
)
from external_storage.claims import has_intent
from external_storage.kube.client import Client
from external_storage.persistent_volume import is_ours
from external_storage.shares.location import below

_LOOK_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """An access point or a directory."""

    file_system: str
    name: str
    """The id of an access point; ``directory`` for the other kind."""
    volume: str
    path: str

    @property
    def is_access_point(self) -> bool:
        return self.name.startswith("fsap-")


class Inventory:
    """Use it in a ``with``: what is mounted here is looked at by processes of its own.

    All methods raise what ``Aws``, ``ShareDirectories`` and ``Client`` raise: half a list would
    look like a whole one.
    """

    def __init__(self, settings: EfsSettings, client: Client) -> None:
        self._names = settings.names
        self._client = client
        self._owner = owner_of(settings, client)
        self._aws = Aws(settings.aws_region)
        self._systems = settings.read_file_systems().found(self._aws.dns_name)
        self._shares = shares_of(
            self._systems.values(),
            owner=self._owner.of_records,
            call_limit_s=settings.call_timeout,
        )

    def __enter__(self) -> Self:
        for share in self._shares.values():
            share.share.start()
        for share in self._shares.values():
            share.share.wait_looked_at(_LOOK_S)
            if (problem := share.problem()) is not None:
                raise ProvisioningFailed(problem)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for share in self._shares.values():
            share.share.stop()

    def orphans(self) -> list[Item]:
        """What we have made, in this cluster, that no volume and no claim under way leads to."""
        # In this order: what is made meanwhile has its claim by then, or is not listed yet.
        points = list(self._access_points())
        records = [
            (id, record) for id, share in self._shares.items() for record in share.records.all()
        ]
        wanted = {claim.uid for claim in self._claims()}
        volumes = {volume.name for volume in self._volumes()}
        found = [
            _item(point)
            for point in points
            if point.tags.get(VOLUME) not in volumes and point.tags.get(CLAIM_UID) not in wanted
        ]
        found += [
            Item(
                file_system=id,
                name="directory",
                volume=record.name,
                path=str(record.details.get("path", "")),
            )
            for id, record in records
            if record.name not in volumes and record.claim_uid not in wanted
        ]
        return found

    def remove(self, item: Item) -> str:
        """Delete an orphaned access point; what was done, in words for people."""
        if not item.is_access_point:
            return "a directory is kept: it may hold data; archive or remove it by hand"
        try:
            self._aws.delete_access_point(item.name)
        except ProvisionerError as error:
            return f"not deleted: {error}"
        return f"deleted; the directory {item.path} is kept"

    def missing(self) -> list[Item]:
        """Volumes of ours whose access point or directory is not there."""
        volumes = self._volumes()
        points = {point.id for point in self._access_points(ours=False)}
        return [
            item
            for volume in volumes
            if (item := self._expected(volume)) is not None
            and not (item.name in points if item.is_access_point else self._is_there(item))
        ]

    # -- inside

    def _access_points(self, *, ours: bool = True) -> Iterator[AccessPoint]:
        for id in self._systems:
            for point in self._aws.access_points(id):
                if not ours or self._owner.has_made(point.tags):
                    yield point

    def _volumes(self) -> list[PersistentVolume]:
        return [v for v in self._client.list_all(PersistentVolume) if is_ours(v, self._names)]

    def _claims(self) -> list[PersistentVolumeClaim]:
        """Those for which a volume is being made."""
        return [c for c in self._client.list_all(PersistentVolumeClaim) if has_intent(c)]

    def _expected(self, volume: PersistentVolume) -> Item | None:
        """Where a volume leads to; None if that cannot be looked at from here."""
        handle = handle_of(volume)
        if handle is not None and handle.file_system in self._systems:
            return Item(
                file_system=handle.file_system,
                name=handle.access_point,
                volume=volume.name,
                path="",
            )
        id = file_system_of(volume)
        if volume.spec.nfs is None or id not in self._shares:
            return None
        path = below(self._systems[id].path, volume.spec.nfs.path)
        return Item(file_system=id, name="directory", volume=volume.name, path=path or "")

    def _is_there(self, item: Item) -> bool:
        return bool(item.path) and self._shares[item.file_system].exists(item.path)


def _item(point: AccessPoint) -> Item:
    return Item(
        file_system=point.file_system,
        name=point.id,
        volume=point.tags.get(VOLUME, ""),
        path=point.path,
    )
