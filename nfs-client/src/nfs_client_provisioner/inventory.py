"""What is on the shares beside what volumes there are: orphans and what is missing."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from external_storage import (
    AssetRecord,
    AssetState,
    PersistentVolume,
    ProvisionerError,
)
from external_storage.kube.client import Client
from external_storage.owner import OwnerFinder
from external_storage.persistent_volume import is_ours
from external_storage.shares import looked_at
from nfs_client_provisioner.ledger import Place
from nfs_client_provisioner.settings import NfsClientSettings
from nfs_client_provisioner.shares import Mounted, Servers

_LOOK_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A volume's directory."""

    place: Place
    volume: str
    claim: str = ""
    is_there: bool


@contextmanager
def opened(settings: NfsClientSettings, client: Client) -> Iterator[Inventory]:
    """The inventory of all servers; ShareUnavailable if one of them is."""
    owner = OwnerFinder(client, settings.names)
    servers = Servers(
        [
            Mounted.of(server, owner=owner, call_limit_s=settings.call_timeout)
            for server in settings.read_servers()
        ]
    )
    with looked_at([one.directories.share for one in servers.all()], _LOOK_S):
        yield Inventory(servers, client, settings.names)


class Inventory:
    """What the shares hold and what the API server says, as of each call.

    All methods raise what ``ShareDirectories`` and ``Client`` raise: half a list would look like a
    whole one.
    """

    def __init__(self, servers: Servers, client: Client, names: Collection[str]) -> None:
        self._servers = servers
        self._client = client
        self._names = frozenset(names)

    def orphans(self) -> list[Item]:
        """What was a volume of this provisioner, and has no PersistentVolume any more."""
        # In this order: a record is published when its volume has been saved.
        records = [
            (one, record)
            for one in self._servers.all()
            for record in one.directories.records.all()
            if record.state is AssetState.PUBLISHED
        ]
        volumes = {volume.name for volume in self._client.list_all(PersistentVolume)}
        return [_item(one, record) for one, record in records if record.name not in volumes]

    def forget(self, item: Item) -> str:
        """Forget an orphan; its directory stays. What was done, in words for people."""
        mounted = self._servers.pick(item.place.server)
        if self._client.find(PersistentVolume, item.volume) is not None:
            return "not forgotten: its PersistentVolume is there again"
        try:
            mounted.directories.keep(item.volume)
        except (ProvisionerError, OSError) as error:
            return f"not forgotten: {error}"
        return f"forgotten; {item.place.path} stays as it is, and is yours"

    def missing(self) -> list[Item]:
        """Volumes of this provisioner whose directory is not there, on the servers we know."""
        found = []
        for volume in self._client.list_all(PersistentVolume):
            known = self._servers.find(volume) if is_ours(volume, self._names) else None
            if known is None:
                continue
            mounted, place = known
            if not _is_there(mounted, place.path):
                reference = volume.spec.claim_ref
                claim = f"{reference.namespace}/{reference.name}" if reference else ""
                item = Item(place=place, volume=volume.name, claim=claim, is_there=False)
                found.append(item)
        return found


def _item(mounted: Mounted, record: AssetRecord) -> Item:
    path = str(record.details.get("path", ""))
    return Item(
        place=Place(server=mounted.server.name, path=path),
        volume=record.name,
        claim=record.claim,
        is_there=_is_there(mounted, path),
    )


def _is_there(mounted: Mounted, path: str) -> bool:
    try:
        return mounted.directories.exists(path)
    except ValueError:  # a path that no volume of ours can have
        return False
