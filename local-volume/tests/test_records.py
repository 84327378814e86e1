"""What a record may be trusted for: one release, of one volume, from one claim."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from external_storage import PersistentVolume
from external_storage.kube.types import (
    LocalVolumeSource,
    ObjectMeta,
    ObjectReference,
    VolumeSpec,
    VolumeStatus,
)
from local_volume_provisioner import records
from local_volume_provisioner.config import ClassConfig, VolumeMode
from local_volume_provisioner.identity import Identity
from local_volume_provisioner.ledger import Record, SavedClass, Use
from local_volume_provisioner.scan import Candidate, Kind

CLASS = ClassConfig(name="c", host_dir="/d", mount_dir="/d", mode=VolumeMode.BLOCK)
BARE = Identity(kind="device", size=1 << 30, boot_id="1", device="8:0")
HALF: dict[str, Any] = {"bytes_done": 512, "passes_done": 1, "method": "zero"}


def record(use: Use, **fields: Any) -> Record:
    fields = {"uid": "u1", "claim": "c1", "identity": BARE, **fields}
    return Record(path="/d/a", saved_class=SavedClass.of(CLASS), use=use, **fields)


def volume(
    phase: str, claim: str = "", uid: str = "u1", policy: str = "Delete"
) -> PersistentVolume:
    return PersistentVolume(
        metadata=ObjectMeta(name="v", uid=uid),
        spec=VolumeSpec(
            local=LocalVolumeSource(path="/d/a"),
            claim_ref=ObjectReference(name="claim", uid=claim) if claim else None,
            persistent_volume_reclaim_policy=policy,
        ),
        status=VolumeStatus(phase=phase),
    )


@pytest.mark.parametrize("use", [Use.CLEANING, Use.CLEAN])
@pytest.mark.parametrize(
    ("shown", "now"),
    [
        (volume("Released", "c1"), None),
        # Taken back into service, and perhaps released again since.
        (volume("Available"), Use.USED),
        (volume("Bound", "c2"), Use.USED),
        (volume("Released", "c2"), Use.USED),
        # Made anew, as from a backup.
        (volume("Bound", "c1", uid="u2"), Use.USED),
        (volume("Released", "c1", uid="u2"), Use.USED),
    ],
)
def test_a_wipe_counts_for_one_release(use: Use, shown: PersistentVolume, now: Use | None) -> None:
    found = records.noted(record(use, **HALF), shown, "k")
    assert found.use is (now or use)
    done = (found.bytes_done, found.passes_done, found.claim)
    assert done == ((0, 0, "") if now else (512, 1, "c1"))
    assert (found.uid, found.volume, found.cluster) == (shown.uid, "v", "k")


def test_a_policy_that_changes_is_known() -> None:
    found = records.noted(record(Use.USED), volume("Released", "c1", policy="Retain"), "k")
    assert found.policy == "Retain"


def test_what_was_wiped_for_another_volume_is_free_for_a_new_one() -> None:
    found = records.noted(record(Use.CLEAN), volume("Available", uid="u2"), "k")
    assert found.use is Use.OFFERED


def test_progress_does_not_go_over_to_what_may_be_another_disk() -> None:
    """A disk without ids, in a new boot: of the same size, and that is all."""
    now = msgspec.structs.replace(BARE, boot_id="2")
    candidate = Candidate(
        class_config=CLASS, entry="a", kind=Kind.DEVICE, size=1 << 30, identity=now, number=8,
        family=frozenset({8}),
    )  # fmt: skip
    old = record(Use.CLEANING, **HALF)
    fresh = records.refreshed(old, candidate)
    assert (fresh.identity, fresh.bytes_done, fresh.passes_done) == (now, 0, 0)
    begun = records.begun(old, candidate, CLASS, records.Release("u1", "c1", "k"))
    assert begun.bytes_done == 0
