"""What is written down about an entry, and what a record may be trusted for.

A wipe counts for one release only: that of the volume and the claim it was done for. Whatever shows
that the volume has been in anybody's hands since makes its disk dirty again.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from external_storage import PersistentVolume
from local_volume_provisioner import identity
from local_volume_provisioner.config import ClassConfig
from local_volume_provisioner.identity import Verdict
from local_volume_provisioner.ledger import Record, SavedClass, Use
from local_volume_provisioner.scan import Candidate, Kind
from local_volume_provisioner.volumes import identity_of


@dataclass(frozen=True, slots=True)
class Release:
    """For whom a disk is wiped."""

    uid: str = ""
    """Of the volume; empty where there is none any more."""
    claim: str = ""
    """UID of the claim that has let go of it."""
    cluster: str = ""

    @classmethod
    def of(cls, volume: PersistentVolume | None, cluster: str) -> Release:
        return cls(volume.uid, claim_uid(volume), cluster) if volume else cls(cluster=cluster)


def claim_uid(volume: PersistentVolume) -> str:
    return volume.spec.claim_ref.uid if volume.spec.claim_ref is not None else ""


def shows_use(volume: PersistentVolume) -> bool:
    """Whether somebody has it, or has had it."""
    return volume.spec.claim_ref is not None or volume.status.phase in ("Bound", "Released")


def is_release(record: Record, volume: PersistentVolume) -> bool:
    """Whether the wipe on record is the one that this release of this volume asks for."""
    return (
        volume.status.phase == "Released"
        and record.uid == volume.uid
        and record.claim == claim_uid(volume) != ""
    )


def of_candidate(candidate: Candidate, use: Use, cluster: str) -> Record:
    return Record(
        path=candidate.path,
        saved_class=SavedClass.of(candidate.class_config),
        use=use,
        identity=candidate.identity,
        cluster=cluster,
    )


def first(
    path: str,
    volume: PersistentVolume,
    config: ClassConfig | None,
    candidate: Candidate | None,
) -> Record | None:
    """Of a volume that came without one. What is there is taken for what it was made of, unless it
    says other things; of a released one nobody can say it, and a person is asked."""
    known = identity_of(volume)
    if known is None and candidate and volume.status.phase in ("Available", "Bound"):
        known = candidate.identity
    if known is None or config is None:
        return None
    return Record(path=path, saved_class=SavedClass.of(config), use=Use.OFFERED, identity=known)


def noted(record: Record, volume: PersistentVolume, cluster: str) -> Record:
    """The record with what the volume shows."""
    if record.use is Use.RETIRED:
        return record
    seen = msgspec.structs.replace(
        record,
        uid=volume.uid,
        volume=volume.name,
        policy=volume.spec.persistent_volume_reclaim_policy,
        cluster=cluster,
    )
    if record.use in (Use.CLEANING, Use.CLEAN) and is_release(record, volume):
        return seen
    # Clean and free again without having been deleted: somebody may have had it meanwhile. Of
    # another UID: made anew by somebody, perhaps from a backup; what is dirty stays so.
    dirty = shows_use(volume) or record.dirty
    dirty = dirty or (record.use is Use.CLEAN and record.uid == volume.uid)
    use = Use.USED if dirty else Use.OFFERED
    return msgspec.structs.replace(seen, use=use, claim="", passes_done=0, bytes_done=0, method="")


def refreshed(record: Record, candidate: Candidate) -> Record:
    """With the ids of today, where what is there is what was recorded."""
    found = identity.compare(record.identity, candidate.identity)
    if found.verdict not in (Verdict.SAME, Verdict.LIKELY):
        return record
    now = identity.refreshed(record.identity, candidate.identity)
    if now == record.identity:
        return record
    # Of a disk without ids nobody can swear that it is the one whose first half is wiped.
    return msgspec.structs.replace(record, identity=now, passes_done=0, bytes_done=0)


def begun(old: Record | None, candidate: Candidate, config: ClassConfig, of: Release) -> Record:
    """For a wipe that begins; what an earlier life has done counts if nothing has changed."""
    method = "delete files" if candidate.kind is Kind.MOUNT else str(config.method)
    fresh = Record(
        path=candidate.path,
        saved_class=SavedClass.of(config),
        use=Use.CLEANING,
        identity=candidate.identity,
        uid=of.uid,
        claim=of.claim,
        cluster=of.cluster,
        method=method,
    )
    if old is None:
        return fresh
    fresh = msgspec.structs.replace(
        fresh, uid=of.uid or old.uid, volume=old.volume, policy=old.policy
    )
    if identity.compare(old.identity, candidate.identity).verdict is not Verdict.UNKNOWN:
        known = identity.refreshed(old.identity, candidate.identity)
        fresh = msgspec.structs.replace(fresh, identity=known)
    then, now = ((r.uid, r.claim, r.method, r.identity) for r in (old, fresh))
    if old.use is not Use.CLEANING or then != now:
        return fresh
    return msgspec.structs.replace(fresh, passes_done=old.passes_done, bytes_done=old.bytes_done)


def without_path(record: Record) -> str:
    """Under which key a disk is remembered whose path another one has."""
    return f"disk {identity.digest(record.identity)}"


def withdrawn(record: Record) -> Record | None:
    """Of a free volume that we have taken back: as new, unless somebody had it earlier."""
    return msgspec.structs.replace(record, uid="") if record.dirty else None


def retired(record: Record | None, candidate: Candidate | None) -> Record | None:
    if record is not None:
        return msgspec.structs.replace(record, use=Use.RETIRED, uid="")
    return of_candidate(candidate, Use.RETIRED, "") if candidate is not None else None
