"""The servers as they are mounted in our pod, and what is asked of one beside its directories."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from external_storage import Infeasible, Owner, PersistentVolume, ProvisioningFailed
from external_storage.shares import Share, ShareDirectories, ShareUnavailable, check_path
from external_storage.shares.layout import Site, opened
from external_storage.shares.location import same_server
from nfs_client_provisioner.ledger import Place
from nfs_client_provisioner.servers import Server
from nfs_client_provisioner.stored import Stored


@dataclass(frozen=True, slots=True)
class Mounted:
    """One server with its share."""

    server: Server
    directories: ShareDirectories
    company: threading.Lock = field(default_factory=threading.Lock)
    """Held while one of several volumes with the same directory is deleted."""

    @classmethod
    def of(cls, server: Server, *, owner: Callable[[], Owner], call_limit_s: float) -> Self:
        """Touches nothing yet."""
        share = Share(
            server.name,
            server=server.server,
            path=server.path,
            mount_point=server.mount_point,
            expected=server.expected(),
            call_limit_s=call_limit_s,
        )
        return cls(server, ShareDirectories(share, owner=owner))

    def size(self) -> int:
        """Bytes of the server's file system, when it was last looked at; ShareUnavailable."""
        share = self.directories.share
        if share.facts is None:
            raise ShareUnavailable(f"{share} has not been looked at yet")
        return share.facts.size

    def group_of(self, path: str) -> int:
        """The gid of a directory; ShareUnavailable, OSError."""
        return self.directories.share.call(_group_of, path)


class Servers:
    """All servers, by name and by what stands on a volume."""

    def __init__(self, mounted: Sequence[Mounted]) -> None:
        self._mounted: Mapping[str, Mounted] = {one.server.name: one for one in mounted}

    def all(self) -> list[Mounted]:
        return list(self._mounted.values())

    def pick(self, name: str) -> Mounted:
        """The server that a class asks for; ``Infeasible`` names those there are."""
        if name in self._mounted:
            return self._mounted[name]
        names = ", ".join(sorted(self._mounted))
        if name:
            raise Infeasible(f"parameter 'server': there is no server {name!r}; there are: {names}")
        if len(self._mounted) > 1:
            raise Infeasible(f"parameter 'server': must be given, one of: {names}")
        return next(iter(self._mounted.values()))

    def find(self, volume: PersistentVolume) -> tuple[Mounted, Place] | None:
        """By a volume's source alone: the server it is on, and its directory there."""
        source = volume.spec.nfs
        if source is None:
            return None
        for one in self._mounted.values():
            path = one.server.relative(source.path)
            if path is not None and same_server(source.server, one.server.server):
                return one, Place(server=one.server.name, path=path)
        return None

    def find_stored(self, volume: PersistentVolume, stored: Stored | None) -> tuple[Mounted, Place]:
        """As ``find``, checked against what was stored on the volume when it was made.

        Whoever may write volumes must not move our hand to another directory by one of the two.
        Raises ``ProvisioningFailed``: nothing of it may be touched.
        """
        found = self.find(volume)
        source = volume.spec.nfs
        if source is None:
            raise ProvisioningFailed("the volume has no NFS source: nothing is removed")
        if found is None:
            served = ", ".join(f"{m.server.server}:{m.server.path}" for m in self.all())
            raise ProvisioningFailed(
                f"{source.server}:{source.path} is not below what is served here, {served}: "
                "nothing is removed"
            )
        mounted, place = found
        try:
            check_path(place.path)
        except ValueError as error:
            raise ProvisioningFailed(f"the volume's path: {error}: nothing is removed") from error
        if stored is not None and (stored.base, stored.path) != (mounted.server.path, place.path):
            raise ProvisioningFailed(
                f"the volume's path {source.path} is not the {stored.path!r} below {stored.base} "
                f"that it was made with, or the base is now {mounted.server.path}: nothing is "
                "removed"
            )
        return mounted, place


def _group_of(site: Site, path: str) -> int:
    with opened(site) as tree:
        return tree.stat(path).st_gid
