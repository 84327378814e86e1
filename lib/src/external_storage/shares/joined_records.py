"""The asset records of several shares as one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from external_storage.assets import AssetRecord
from external_storage.deadline import Deadline
from external_storage.kube.types import PersistentVolumeClaim
from external_storage.shares.records import SHARE, ShareRecords
from external_storage.shares.share import ShareUnavailable

_WAIT_S = 5.0


class JoinedRecords:
    """A provisioner's ``records``: those of all its shares. One that hangs holds up no other.

    Of a share that cannot be read at this moment, what was read before counts; where a record might
    be on one that has not been read, ``get`` and ``forget`` raise ShareUnavailable.
    """

    def __init__(self, parts: Sequence[ShareRecords]) -> None:
        self._parts = tuple(parts)

    def begin(
        self,
        name: str,
        *,
        claim: PersistentVolumeClaim,
        owner: str = "",
        details: dict[str, Any] | None = None,
    ) -> AssetRecord:
        """On the share that ``details["share"]`` names; ValueError if there is none."""
        wanted = (details or {}).get(SHARE)
        for part in self._parts:
            if part.share.name == wanted:
                return part.begin(name, claim=claim, owner=owner, details=details)
        known = ", ".join(part.share.name for part in self._parts)
        raise ValueError(f"no share has the name {wanted!r}: there are {known}")

    def read_again(self) -> None:
        """All at the same time; what is not read within some seconds is waited for by nobody."""
        limit = Deadline(time.monotonic() + _WAIT_S)
        for part in self._parts:
            part.read_again(timeout_s=0)
        for part in self._parts:
            part.share.wait_looked_at(limit.remaining())

    def publish(self, name: str) -> None:
        """The volume has been saved; no effect without a record that is known."""
        for part in self._parts:
            if name in part:
                part.publish(name)

    def forget(self, name: str) -> None:
        """The asset is gone; a missing record is a success."""
        for part in self._parts_that_may_have(name):
            part.forget(name)

    def get(self, name: str) -> AssetRecord | None:
        """The record of ``name``; ``DamagedRecord`` if its file cannot be read as one."""
        for part in self._parts_that_may_have(name):
            return part.get(name)
        return None

    def all(self) -> list[AssetRecord]:
        """Every readable record that is known, by name."""
        found = [record for part in self._parts for record in part.all()]
        return sorted(found, key=lambda record: record.name)

    def unfinished(self, claim_uid: str) -> AssetRecord | None:
        """The record of what was begun for a claim and not published, if it is known."""
        for part in self._parts:
            if (record := part.unfinished(claim_uid)) is not None:
                return record
        return None

    def unfinished_claims(self) -> list[str]:
        """The UIDs of the claims that ``unfinished`` has a record for."""
        return [uid for part in self._parts for uid in part.unfinished_claims()]

    def _parts_that_may_have(self, name: str) -> list[ShareRecords]:
        having = [part for part in self._parts if name in part]
        if not having:
            for part in self._parts:
                if not part.are_read:
                    raise ShareUnavailable(f"{part.share}: its records have not been read")
        return having
