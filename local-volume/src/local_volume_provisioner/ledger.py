"""What this node remembers of each entry, durably: offered, used, being cleaned, clean.

A PersistentVolume can be deleted by anybody at any time, and with it the only other memory that a
disk holds somebody's data. SQLite, because a thousand new volumes are one transaction with it and a
thousand files with fsync are not.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

import msgspec

from external_storage import CannotStart
from local_volume_provisioner.config import ClassConfig, CleanPolicy, RequiredIdentity, VolumeMode
from local_volume_provisioner.identity import Identity
from local_volume_provisioner.methods import Method, MethodKind

_FORMAT = 1
"""Of what is in the database, as its ``user_version``; 0 is one without claims and clusters."""


class Use(StrEnum):
    """What may have become of the data."""

    OFFERING = "offering"
    """Written before the volume is created: nobody has had it yet. Only as long as we watch: after
    a restart nobody knows whether it has been created, used and deleted."""
    OFFERED = "offered"
    """It has been a volume; somebody may have used it since."""
    USED = "used"
    """A claim has been bound to it: dirty."""
    CLEANING = "cleaning"
    """Dirty, and a wipe has begun."""
    CLEAN = "clean"
    RETIRED = "retired"
    """Taken out of service by an admin."""


class SavedClass(msgspec.Struct, rename="camel", omit_defaults=True, frozen=True):
    """The class as it was: so that what it has left can be cleaned when it is gone."""

    name: str
    host_dir: str
    mount_dir: str
    mode: VolumeMode
    method_kind: MethodKind
    passes: int
    command: tuple[str, ...]
    clean_policy: CleanPolicy
    required_identity: RequiredIdentity
    fs_type: str = ""

    @classmethod
    def of(cls, config: ClassConfig) -> SavedClass:
        return cls(
            name=config.name,
            host_dir=config.host_dir,
            mount_dir=config.mount_dir,
            mode=config.mode,
            method_kind=config.method.kind,
            passes=config.method.passes,
            command=config.method.command,
            clean_policy=config.clean_policy,
            required_identity=config.required_identity,
            fs_type=config.fs_type,
        )

    def config(self) -> ClassConfig:
        return ClassConfig(
            name=self.name,
            host_dir=self.host_dir,
            mount_dir=self.mount_dir,
            mode=self.mode,
            method=Method(self.method_kind, self.passes, self.command),
            clean_policy=self.clean_policy,
            required_identity=self.required_identity,
            fs_type=self.fs_type,
        )


class Record(msgspec.Struct, rename="camel", omit_defaults=True, frozen=True):
    """One entry."""

    path: str
    """On the host."""
    saved_class: SavedClass
    use: Use
    identity: Identity
    uid: str = ""
    """Of the volume that this is about, also when that is gone; empty when there was none."""
    volume: str = ""
    """Its name."""
    policy: str = ""
    """Its reclaim policy when it was seen last."""
    claim: str = ""
    """The UID of the claim after whose release it is being wiped, or has been; empty when it is
    wiped without a volume. A wipe counts for that release alone."""
    cluster: str = ""
    """Where the volume was; see ``node.cluster``."""
    passes_done: int = 0
    """Of a wipe under way."""
    bytes_done: int = 0
    """Of its present pass: wiped, and on the disk."""
    method: str = ""
    """What the wipe under way was begun with; progress counts for the same one only."""

    @property
    def dirty(self) -> bool:
        return self.use in (Use.USED, Use.CLEANING)


_decoder = msgspec.json.Decoder(Record)


class Ledger:
    """All records; what a method has changed is on the disk when it returns."""

    def __init__(self, directory: Path) -> None:
        """Raises CannotStart when it cannot be used: to go on without it could lose data."""
        path = directory / "ledger.db"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                path, timeout=1.0, check_same_thread=False, isolation_level=None
            )
            # One process only, for good: a second agent would decide by what it remembers.
            self._database.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS records (path TEXT PRIMARY KEY, body BLOB NOT NULL)"
            )
            self._database.execute("COMMIT")
            (found,) = self._database.execute("PRAGMA user_version").fetchone()
            if found > _FORMAT:
                raise CannotStart(f"the ledger {path} is of a later version: {found}")
            rows = self._database.execute("SELECT path, body FROM records").fetchall()
            read = [_decoder.decode(body) for _, body in rows]
            fresh = [_of_an_earlier_life(r if found else _of_an_earlier_format(r)) for r in read]
            self._lock = threading.Lock()
            self._records: dict[str, Record] = {}
            self.write(fresh)
            self._database.execute(f"PRAGMA user_version = {_FORMAT}")
        except (OSError, sqlite3.Error, msgspec.DecodeError) as error:
            raise CannotStart(f"the ledger {path} cannot be used: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def get(self, path: str) -> Record | None:
        return self._records.get(path)

    def all(self) -> list[Record]:
        return list(self._records.values())

    def write(self, records: Iterable[Record]) -> None:
        """Replace these records, all or none. Raises sqlite3.Error, and then nothing is changed."""
        fresh = {record.path: record for record in records}
        rows = [(path, msgspec.json.encode(record)) for path, record in fresh.items()]
        with self._lock:
            if not rows:
                return
            with _transaction(self._database) as database:
                database.executemany("INSERT OR REPLACE INTO records VALUES (?, ?)", rows)
            self._records = {**self._records, **fresh}

    def swap(self, old: Record | None, new: Record | None, path: str) -> bool:
        """Replace what is known of a path, if that still is ``old``; None is: nothing."""
        with self._lock:
            if self._records.get(path) != old:
                return False
            with _transaction(self._database) as database:
                if new is None:
                    database.execute("DELETE FROM records WHERE path = ?", (path,))
                else:
                    body = msgspec.json.encode(new)
                    database.execute("INSERT OR REPLACE INTO records VALUES (?, ?)", (path, body))
            others = {p: r for p, r in self._records.items() if p != path}
            self._records = others if new is None else {**others, path: new}
            return True

    def move(self, path: str, to: str) -> None:
        """The disk has another path now; what was known of that one is forgotten."""
        record = msgspec.structs.replace(self._records[path], path=to)
        with self._lock:
            with _transaction(self._database) as database:
                database.execute("DELETE FROM records WHERE path = ?", (path,))
                body = msgspec.json.encode(record)
                database.execute("INSERT OR REPLACE INTO records VALUES (?, ?)", (to, body))
            self._records = {p: r for p, r in self._records.items() if p != path} | {to: record}

    def forget(self, path: str) -> None:
        with self._lock:
            with _transaction(self._database) as database:
                database.execute("DELETE FROM records WHERE path = ?", (path,))
            self._records = {p: r for p, r in self._records.items() if p != path}


def _of_an_earlier_format(record: Record) -> Record:
    """What it says of being clean cannot be relied on, and nobody knows the reclaim policy."""
    if record.use is Use.RETIRED:
        return record
    use = Use.USED if record.dirty else Use.OFFERED
    return msgspec.structs.replace(record, use=use, passes_done=0, bytes_done=0, method="")


def _of_an_earlier_life(record: Record) -> Record:
    """What counts only as long as somebody watches."""
    if record.use is Use.OFFERING:
        return msgspec.structs.replace(record, use=Use.OFFERED)
    if record.use is Use.CLEANING and not record.claim:
        return msgspec.structs.replace(record, passes_done=0, bytes_done=0)
    return record


class _transaction:  # noqa: N801 - used as a statement
    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> sqlite3.Connection:
        self._database.execute("BEGIN IMMEDIATE")
        return self._database

    def __exit__(self, kind: object, *_: object) -> None:
        self._database.execute("COMMIT" if kind is None else "ROLLBACK")
