"""Asset records: what was begun in the backend, written down before it was begun.

A record lies beside the assets and outside all of them: a fresh volume is empty, and a tenant must
not be able to forge one. It is ``provisioning`` from before the first change to the backend until
the library has saved the PersistentVolume, and ``published`` from then on. After a crash a
``provisioning`` record is what tells an abandoned asset from a foreign one.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import msgspec

from external_storage.durable import replace_file, sync_directory
from external_storage.kube.types import PersistentVolumeClaim
from external_storage.logs import get_logger

log = get_logger(__name__)

_SUFFIX = ".json"
# A file name has at most 255 bytes.
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,248}[a-z0-9])?", re.ASCII)


class AssetState(StrEnum):
    """How far the asset of a record has come."""

    PROVISIONING = "provisioning"
    PUBLISHED = "published"


@dataclass(frozen=True, slots=True, kw_only=True)
class AssetRecord:
    """One record; its file is JSON with these keys."""

    name: str
    """The volume's name, also the file's."""
    state: AssetState
    owner: str
    """Who made the asset, where others reach it, too: see ``owner.Owner``."""
    claim_uid: str
    claim: str = ""
    """``namespace/name`` of the claim, for asking whether it is still there."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the provisioner needs to find and remove the asset; JSON values only."""


# Worked out once and now: see kube/decoding.py for why not by the first thread that comes.
_decode = msgspec.json.Decoder(AssetRecord).decode


class DamagedRecord(Exception):
    """A record file that cannot be read as one; it is left where it is."""


class RecordFiles(Protocol):
    """Where records are kept: one small file for each name. All of it may raise OSError."""

    def read(self, name: str) -> bytes | None:
        """What is in the file; None without one."""

    def write(self, name: str, data: bytes) -> None:
        """Make the file hold ``data``: on disk when it returns, and never a part of it."""

    def unlink(self, name: str) -> None:
        """Remove the file, for good when it returns; a missing one is a success."""

    def names(self) -> list[str]:
        """Of all files, sorted."""

    def place(self, name: str) -> str:
        """Where the file is, for people."""


class Records(Protocol):
    """What the library, and a provisioner, asks of its records: see ``AssetRecords``."""

    def begin(
        self,
        name: str,
        *,
        claim: PersistentVolumeClaim,
        owner: str = "",
        details: dict[str, Any] | None = None,
    ) -> AssetRecord: ...

    def publish(self, name: str) -> None: ...

    def forget(self, name: str) -> None: ...

    def get(self, name: str) -> AssetRecord | None: ...

    def all(self) -> list[AssetRecord]: ...

    def unfinished(self, claim_uid: str) -> AssetRecord | None: ...

    def unfinished_claims(self) -> list[str]: ...

    def read_again(self) -> None: ...


class AssetRecords:
    """The records in one directory; every change is on disk when the method returns.

    Safe to use from several threads, for the same name too: a record is published by the work on
    its claim and forgotten by the work on its volume.
    """

    def __init__(self, files: Path | RecordFiles) -> None:
        """``files``: the directory, made if missing and readable by us alone; or what keeps them
        elsewhere."""
        self._files = LocalRecordFiles(files) if isinstance(files, Path) else files
        self._lock = threading.Lock()
        """Held during a change, which may take as long as the disk does; nobody reads under it."""
        self._unfinished: dict[str, str] = {}
        self._index()

    def read_again(self) -> None:
        """Find what another replica, which worked in this directory until now, has left there."""
        with self._lock:
            self._index()

    def _index(self) -> None:
        self._unfinished = {
            record.claim_uid: record.name
            for record in self.all()
            if record.state is AssetState.PROVISIONING
        }

    def begin(
        self,
        name: str,
        *,
        claim: PersistentVolumeClaim,
        owner: str = "",
        details: dict[str, Any] | None = None,
    ) -> AssetRecord:
        """Write down that the asset ``name`` is about to be made; replaces an earlier record.

        One of the same claim that is published stays published: its volume is there.
        """
        state = AssetState.PUBLISHED if self._is_published(name, claim) else AssetState.PROVISIONING
        record = AssetRecord(
            name=name,
            state=state,
            owner=owner,
            claim_uid=claim.uid,
            claim=claim.key,
            details=details or {},
        )
        with self._lock:
            self._write(record)
            if state is AssetState.PROVISIONING:
                self._unfinished[record.claim_uid] = name
        return record

    def unfinished(self, claim_uid: str) -> AssetRecord | None:
        """The record of what was begun for a claim and not published; ``DamagedRecord``."""
        name = self._unfinished.get(claim_uid)
        return self.get(name) if name is not None else None

    def unfinished_claims(self) -> list[str]:
        """The UIDs of the claims that ``unfinished`` has a record for."""
        return list(self._unfinished)

    def publish(self, name: str) -> None:
        """The volume has been saved; no effect without a record or when it is published already."""
        with self._lock:
            record = self.get(name)
            if record is not None and record.state is not AssetState.PUBLISHED:
                self._write(replace(record, state=AssetState.PUBLISHED))
            if record is not None:
                self._finish(record.claim_uid, name)

    def get(self, name: str) -> AssetRecord | None:
        """The record of ``name``; ``DamagedRecord`` if its file cannot be read as one."""
        data = self._files.read(_checked(name))
        if data is None:
            return None
        try:
            record: AssetRecord = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DamagedRecord(f"{self._files.place(name)}: {error}") from error
        if record.name != name:
            raise DamagedRecord(f"{self._files.place(name)}: is the record of {record.name!r}")
        return record

    def forget(self, name: str) -> None:
        """The asset is gone; a missing record is a success."""
        with self._lock:
            self._files.unlink(_checked(name))
            for claim_uid in [uid for uid, n in self._unfinished.items() if n == name]:
                self._finish(claim_uid, name)

    def all(self) -> list[AssetRecord]:
        """Every readable record, by name; a damaged one is logged and left alone."""
        return self._readable(self._files.names())

    def _readable(self, names: Iterable[str]) -> list[AssetRecord]:
        records = []
        for name in names:
            try:
                record = self.get(name)
            except (DamagedRecord, ValueError) as error:
                log.error("asset record cannot be read", error=str(error))
                continue
            if record is not None:
                records.append(record)
        return records

    def _is_published(self, name: str, claim: PersistentVolumeClaim) -> bool:
        try:
            known = self.get(name)
        except DamagedRecord:
            return False
        return (
            known is not None
            and known.claim_uid == claim.uid
            and known.state is AssetState.PUBLISHED
        )

    def _finish(self, claim_uid: str, name: str) -> None:
        if self._unfinished.get(claim_uid) == name:
            del self._unfinished[claim_uid]

    def _write(self, record: AssetRecord) -> None:
        self._files.write(_checked(record.name), msgspec.json.encode(record))


class LocalRecordFiles:
    """Record files in a directory of ours, on a disk that does not hang."""

    def __init__(self, directory: Path) -> None:
        """``directory`` is made if missing, readable by us alone."""
        self._directory = directory
        # Beside the directory: whoever lists it never meets half a record.
        self._staging = directory.with_name(directory.name + ".tmp")
        for path in (directory, self._staging):
            _make(path)
        self._sweep()

    def read(self, name: str) -> bytes | None:
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        replace_file(path, data, staging=self._staging / path.name)

    def unlink(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)
        sync_directory(self._directory)

    def names(self) -> list[str]:
        return sorted(
            path.name.removesuffix(_SUFFIX) for path in self._directory.glob(f"*{_SUFFIX}")
        )

    def place(self, name: str) -> str:
        return str(self._path(name))

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}{_SUFFIX}"

    def _sweep(self) -> None:
        """Remove what a crash left half written, unless somebody else is at work here: then it may
        be theirs, and whoever comes when all are gone removes it."""
        lock = os.open(self._staging, os.O_RDONLY | os.O_DIRECTORY)
        weakref.finalize(self, os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # In use; or a file system without locks, where what is left stays: it harms nobody.
            log.debug("nothing is swept", directory=str(self._directory), reason=str(error))
        else:
            for left_over in self._staging.iterdir():
                left_over.unlink()
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a volume name of at most 250 characters")
    return name


def _make(directory: Path) -> None:
    """Make a directory with those above it, so that a power cut does not take them away."""
    if directory.is_dir():
        return
    _make(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)
    sync_directory(directory.parent)
