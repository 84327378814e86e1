"""What there is in EFS beside what volumes there are: orphans and what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from efs_provisioner.aws import AccessPoint, Aws
from efs_provisioner.file_systems import FileSystem
from efs_provisioner.places import Places
from efs_provisioner.provisioner import owner_of, shares_of
from efs_provisioner.settings import CSI_DRIVER, EfsSettings
from efs_provisioner.stored import file_system_of, handle_of
from efs_provisioner.tags import CLAIM_UID, VOLUME, Owner
from external_storage import PersistentVolume, PersistentVolumeClaim, ProvisioningFailed
from external_storage.claims import has_intent
from external_storage.kube.client import Client
from external_storage.persistent_volume import is_ours
from external_storage.shares import ShareDirectories, looked_at
from external_storage.shares.location import below, join

_LOOK_S: Final = 30.0
_ACCESS_POINT: Final = re.compile(r"fsap-[0-9a-f]+", re.ASCII)


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


class _Uses:
    """What volumes lead to, also those that an admin has made by hand: an access point by its id,
    whatever else is in the handle, a directory on any server's path."""

    def __init__(self, systems: Mapping[str, FileSystem]) -> None:
        self._systems = systems
        self._names: set[str] = set()
        self._access_points: set[str] = set()
        self._places: dict[str, Places] = {id: Places() for id in systems}

    def add(self, volume: PersistentVolume, *, is_ours: bool) -> None:
        if is_ours:
            self._names.add(volume.name)
        csi, nfs = volume.spec.csi, volume.spec.nfs
        if csi is not None and csi.driver == CSI_DRIVER:
            self._access_points.update(_ACCESS_POINT.findall(csi.volume_handle))
        if nfs is not None and (id := file_system_of(volume, self._systems)) in self._places:
            self._places[id].put(volume.name, nfs.path)

    def has(self, item: Item, *, path: str = "") -> bool:
        """``path``: of a directory, from the root of its file system."""
        if item.volume in self._names or item.name in self._access_points:
            return True
        return bool(path) and bool(self._places[item.file_system].within(path))


@contextmanager
def opened(settings: EfsSettings, client: Client) -> Iterator[Inventory]:
    """The inventory of all file systems; ShareUnavailable if one that is mounted here is."""
    owner = owner_of(settings, client)
    aws = Aws(settings.aws_region)
    systems = settings.read_file_systems().found(aws.dns_name)
    shares = shares_of(systems.values(), owner=owner.of_records, call_limit_s=settings.call_timeout)
    with looked_at([one.share for one in shares.values()], _LOOK_S):
        yield Inventory(systems, shares, aws=aws, client=client, owner=owner)


class Inventory:
    """What EFS holds and what the API server says, as of each call.

    All methods raise what ``Aws``, ``ShareDirectories`` and ``Client`` raise: half a list would
    look like a whole one.
    """

    def __init__(
        self,
        systems: Mapping[str, FileSystem],
        shares: Mapping[str, ShareDirectories],
        *,
        aws: Aws,
        client: Client,
        owner: Owner,
    ) -> None:
        self._systems = systems
        self._shares = shares
        self._aws = aws
        self._client = client
        self._owner = owner
        self._names = frozenset(owner.provisioners)

    def orphans(self) -> list[Item]:
        """What we have made, in this cluster, that no volume and no claim under way leads to."""
        # In this order: what is made meanwhile has its claim by then, or is not listed yet.
        points = list(self._access_points())
        records = [
            (id, record) for id, share in self._shares.items() for record in share.records.all()
        ]
        wanted = {claim.uid for claim in self._claims()}
        uses = self._uses()
        found = [
            item
            for point in points
            if not uses.has(item := _item(point)) and point.tags.get(CLAIM_UID) not in wanted
        ]
        for id, record in records:
            item = Item(
                file_system=id,
                name="directory",
                volume=record.name,
                path=str(record.details.get("path", "")),
            )
            whole = join(self._systems[id].path, item.path)
            if record.claim_uid not in wanted and not uses.has(item, path=whole):
                found.append(item)
        return found

    def remove(self, item: Item) -> None:
        """Delete an orphaned access point, unless a volume has come to use it meanwhile.

        Raises ``ProvisionerError``: also for a directory, which may hold data.
        """
        if not item.is_access_point:
            raise ProvisioningFailed(
                "a directory is kept: it may hold data; archive or remove it by hand"
            )
        if self._uses().has(item):
            raise ProvisioningFailed("a volume uses it now")
        self._aws.delete_access_point(item.name)

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

    def _uses(self) -> _Uses:
        """What the volumes lead to that there are now."""
        uses = _Uses(self._systems)
        for volume in self._client.list_all(PersistentVolume):
            uses.add(volume, is_ours=is_ours(volume, self._names))
        return uses

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
        id = file_system_of(volume, self._systems)
        if volume.spec.nfs is None or id is None or id not in self._shares:
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
