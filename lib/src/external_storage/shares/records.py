"""The asset records of one share, kept on it, and which volume has which directory."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from external_storage.assets import AssetRecord, AssetRecords, AssetState
from external_storage.errors import ProvisioningFailed
from external_storage.kube.types import PersistentVolumeClaim
from external_storage.owner import Owner
from external_storage.shares import record_files
from external_storage.shares.layout import RECORDS, check_path
from external_storage.shares.paths import Paths
from external_storage.shares.share import Share, ShareUnavailable

SHARE, PATH, SHARED = "share", "path", "shared"
"""Keys of a record's details."""

_READ_AT_ONCE = 500
_WAIT_S = 5.0


class PathTaken(ProvisioningFailed):
    """Another volume has the directory, or one below or above it."""


class ShareRecords(AssetRecords):
    """Records in the share's private directory; all are held in memory.

    They are read each time before the share becomes available, so also after a write that was cut
    off: a share whose records are not known takes no claims. Reading never waits for the share;
    ``begin``, ``publish`` and ``forget`` do, and raise ShareUnavailable, as ``get`` does for a name
    that is not known while it has not been read.

    Other clusters, and other provisioners of ours, may have volumes on the same share. Their
    records are there for ``get``, ``every``, ``holders`` and ``conflict`` only: nothing else that
    is asked tells of them, and ``publish`` leaves them alone.
    """

    def __init__(self, share: Share, *, owner: Callable[[], Owner]) -> None:
        """``owner``: who we are, as ``Context.owner`` tells; asked when it first matters, and what
        it raises is raised."""
        self._share = share
        self.owner = owner
        self._cache = _CachedFiles(share)
        self._paths = Paths()
        super().__init__(self._cache)
        share.before_use(self._read)

    @property
    def share(self) -> Share:
        """The share they are on."""
        return self._share

    def __contains__(self, name: object) -> bool:
        """Whether a record of that name is known, damaged or not."""
        return name in self._cache

    @property
    def are_read(self) -> bool:
        """Whether they have been read since the start, and since ``read_again``."""
        return self._cache.is_read

    def read_again(self, *, timeout_s: float = _WAIT_S) -> None:
        """Have them read by the share's thread; waits for it, but not for a share that hangs."""
        self._cache.is_read = False
        self._share.look_anew("its records are being read", timeout_s=timeout_s)

    def begin(
        self,
        name: str,
        *,
        claim: PersistentVolumeClaim,
        owner: str = "",
        details: dict[str, Any] | None = None,
    ) -> AssetRecord:
        """As of AssetRecords; ``details`` has the directory as ``path``. Raises ``PathTaken``."""
        if not self.are_read:
            raise ShareUnavailable(f"{self._share}: its records have not been read")
        owner = owner or str(self.owner())
        details = {**(details or {}), SHARE: self._share.name}
        return super().begin(name, claim=claim, owner=owner, details=details)

    def is_own(self, record: AssetRecord) -> bool:
        """Whether it is of a volume of this cluster and provisioner."""
        return self.owner().owns(record.owner)

    def own(self, name: str) -> AssetRecord | None:
        """As ``get``; raises ``PathTaken`` for one that is not ours."""
        record = self.get(name)
        if record is not None:
            self.refuse_foreign(record)
        return record

    def refuse_foreign(self, record: AssetRecord) -> None:
        """Raise ``PathTaken`` unless the record ``is_own``."""
        if not self.is_own(record):
            raise PathTaken(
                f"the directory belongs to the volume {record.name} of another cluster or "
                f"provisioner, {record.owner}: it is left alone; if that is gone, remove "
                f"{self._cache.place(record.name)}"
            )

    def every(self) -> list[AssetRecord]:
        """``all``, and those of other clusters and provisioners."""
        return super().all()

    def all(self) -> list[AssetRecord]:
        return [record for record in self.every() if self.is_own(record)]

    def unfinished(self, claim_uid: str) -> AssetRecord | None:
        record = super().unfinished(claim_uid)
        return record if record is not None and self.is_own(record) else None

    def unfinished_claims(self) -> list[str]:
        return [record.claim_uid for record in self.begun()]

    def begun(self) -> list[AssetRecord]:
        """The records that ``unfinished`` finds, without a look at the others."""
        found = (self.unfinished(uid) for uid in super().unfinished_claims())
        return [record for record in found if record is not None]

    def publish(self, name: str) -> None:
        record = self.get(name)
        if record is None or record.state is AssetState.PUBLISHED or self.is_own(record):
            super().publish(name)

    def forget(self, name: str) -> None:
        super().forget(name)
        with self._lock:
            self._drop(name)

    def holders(self, path: str) -> list[str]:
        """The names of the volumes whose directory is at ``path``, sorted."""
        with self._lock:
            return sorted(self._paths.at(check_path(path)))

    def gone(self, path: str, is_gone: Callable[[str], bool]) -> list[str]:
        """The volumes of ours at ``path`` that were saved once and of which ``is_gone``, told the
        name, says that they are no more: somebody has deleted them by hand."""
        found = []
        for name in self.holders(path):
            record = self.get(name)
            is_saved = record is not None and record.state is AssetState.PUBLISHED
            if record is not None and is_saved and self.is_own(record) and is_gone(name):
                found.append(name)
        return found

    def conflict(self, name: str, path: str, *, shared: bool = False) -> str | None:
        """Why the volume ``name`` cannot have the directory ``path``, or None."""
        with self._lock:
            return self._paths.conflict(name, check_path(path), shared=shared)

    def catch_up(self) -> None:
        """Read the records that others, or another replica, have written since ours were read."""
        with self._lock:
            changed = self._cache.catch_up(again=set(self._unfinished.values()))
            found = {record.name: record for record in self._readable(changed)}
            for name in changed:
                if name in found:
                    self._enter(found[name])
                else:
                    self._drop(name)

    def _read(self) -> None:
        with self._lock:
            self._cache.read_all()
            self._index()

    def _index(self) -> None:
        unfinished, paths = {}, Paths()
        for record in self.every():
            _enter(paths, record)
            if record.state is AssetState.PROVISIONING:
                unfinished[record.claim_uid] = record.name
        # At once: who is asked meanwhile must not say that nothing was begun.
        self._unfinished, self._paths = unfinished, paths

    def _enter(self, record: AssetRecord) -> None:
        _enter(self._paths, record)
        if record.state is AssetState.PROVISIONING:
            self._unfinished[record.claim_uid] = record.name
        else:
            self._finish(record.claim_uid, record.name)

    def _drop(self, name: str) -> None:
        self._paths.drop(name)
        for uid in [uid for uid, known in self._unfinished.items() if known == name]:
            del self._unfinished[uid]

    def _write(self, record: AssetRecord) -> None:
        path = record.details.get(PATH)
        if isinstance(path, str):
            shared = bool(record.details.get(SHARED))
            if taken := self._paths.conflict(record.name, check_path(path), shared=shared):
                raise PathTaken(taken)
        super()._write(record)
        _enter(self._paths, record)


def _enter(paths: Paths, record: AssetRecord) -> None:
    path = record.details.get(PATH)
    if isinstance(path, str):
        # Not by check_path: one that we would not write today is taken all the same.
        parts = tuple(path.split("/"))
        paths.put(record.name, parts, shared=bool(record.details.get(SHARED)))


class _CachedFiles:
    """Record files on a share, read from memory and written through."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._files: dict[str, bytes] = {}
        self.is_read = False

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def read_all(self) -> None:
        self._files = self._fetch(self._share.call(record_files.names))
        self.is_read = True

    def catch_up(self, *, again: Collection[str]) -> set[str]:
        """What is new or gone, and what is in the files of ``again``: their names."""
        there = self._share.call(record_files.names)
        wanted = [name for name in there if name not in self._files or name in again]
        before = self._files
        kept = {name: before[name] for name in there if name in before}
        self._files = {**kept, **self._fetch(wanted)}
        return {*wanted, *(before.keys() - self._files.keys())}

    def read(self, name: str) -> bytes | None:
        data = self._files.get(name)
        if data is None and not self.is_read:
            raise ShareUnavailable(f"{self._share}: its records have not been read")
        return data

    def write(self, name: str, data: bytes) -> None:
        self._share.call(record_files.write, name, data)
        self._files[name] = data

    def unlink(self, name: str) -> None:
        self._share.call(record_files.unlink, name)
        self._files.pop(name, None)

    def names(self) -> list[str]:
        return sorted(self._files)

    def place(self, name: str) -> str:
        return f"{self._share.mount_point}/{'/'.join(RECORDS)}/{name}{record_files.SUFFIX}"

    def _fetch(self, names: list[str]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        # In pieces, each with a deadline of its own.
        for start in range(0, len(names), _READ_AT_ONCE):
            found |= self._share.call(record_files.read, names[start : start + _READ_AT_ONCE])
        return found
