"""Several clusters, and several provisioners of one, on the same share: each has its own volumes.

Each has a ``ShareDirectories`` of its own here, with what an API server would say of its claims and
volumes; they meet on the share only.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from external_storage import Owner, OwnerUnknown, PersistentVolume
from external_storage.assets import AssetRecord, AssetState
from external_storage.reconciler import Reconciler
from external_storage.shares import (
    PRIVATE,
    Ending,
    Ownership,
    PathTaken,
    ShareDirectories,
)
from external_storage.unfinished import UnfinishedAssets

from .conftest import OURS, Export, claim

OTHER_CLUSTER = Owner("cluster-2", OURS.names)
OTHER_PROVISIONER = Owner(OURS.cluster, ("example.com/other",))

others = pytest.mark.parametrize(
    "other", [OTHER_CLUSTER, OTHER_PROVISIONER], ids=["cluster", "provisioner"]
)


def make(on: ShareDirectories, name: str = "pvc-1", path: str = "data", **options: Any) -> Any:
    return on.make(name, claim=claim(f"uid-of-{name}"), path=path, ownership=Ownership(), **options)


class Cluster:
    """What the controller of one cluster does now and then; its API server has no claim and no
    volume, and all that is looked for is to be discarded."""

    def __init__(self, directories: ShareDirectories) -> None:
        self.directories = directories
        self.orphans: Callable[[], int]

    def find(self, _kind: object, _name: str, *, namespace: str = "") -> None:
        return None

    def reconcile(self) -> None:
        provisioner = SimpleNamespace(
            records=self.directories.records,
            discard=self.directories.discard,
            reconcile=lambda _volumes: self.directories.tidy(),
        )
        unfinished = UnfinishedAssets(
            provisioner=cast(Any, provisioner),
            client=cast(Any, self),
            author=cast(Any, provisioner),
            metrics=cast(Any, SimpleNamespace(discarded=SimpleNamespace(inc=lambda: None))),
            may_work=lambda: True,
        )

        def look_at_claim(uid: str) -> None:
            record = unfinished.of_claim(uid)
            assert record is not None
            unfinished.discard(record)

        volumes: list[PersistentVolume] = []
        reconciler = Reconciler(
            cast(Any, provisioner),
            cast(Any, SimpleNamespace(all=lambda: volumes)),
            look_at_claim=look_at_claim,
            may_work=lambda: True,
        )
        reconciler._once()
        self.orphans = reconciler.orphans


@others
def test_what_another_one_is_making_is_neither_discarded_nor_reported(
    directories: ShareDirectories, export: Export, other: Owner
) -> None:
    make(directories)
    foreign = Cluster(export.directories(owner=other))
    for _ in range(3):
        foreign.reconcile()
    assert (export.point / "data").is_dir()
    directories.records.publish("pvc-1")
    (export.point / "data/file").write_text("precious")
    make(directories, "pvc-2", "more")
    for _ in range(3):
        foreign.reconcile()
        assert foreign.orphans() == 0
    directories.records.catch_up()
    states = {record.name: record.state for record in directories.records.all()}
    assert states == {"pvc-1": AssetState.PUBLISHED, "pvc-2": AssetState.PROVISIONING}
    assert (export.point / "data/file").read_text() == "precious"
    assert (export.point / "more").is_dir()


def test_of_ours_what_nobody_wants_is_discarded_under_whichever_name_it_was_made(
    directories: ShareDirectories, export: Export
) -> None:
    make(directories)
    renamed = Owner(OURS.cluster, tuple(reversed(OURS.names)))
    Cluster(export.directories(owner=renamed)).reconcile()
    assert not (export.point / "data").exists()


def test_a_record_that_has_been_published_since_is_read_again(
    directories: ShareDirectories, export: Export
) -> None:
    """By another replica of ours, that leads."""
    make(directories)
    standby = export.directories()
    directories.records.publish("pvc-1")
    assert standby.records.unfinished_claims() == ["uid-of-pvc-1"]
    standby.tidy()
    assert standby.records.unfinished_claims() == []
    record = standby.records.get("pvc-1")
    assert record is not None
    assert record.state is AssetState.PUBLISHED


@others
def test_a_directory_of_another_one_is_never_given_out(
    directories: ShareDirectories, export: Export, other: Owner
) -> None:
    """Also when it was made after the records were read."""
    foreign = export.directories(owner=other)
    make(directories, shared=True)
    for path in ("data", "data/below"):
        for options in ({}, {"adopt": True}, {"shared": True, "adopt": True}):
            with pytest.raises(PathTaken):
                make(foreign, "pvc-2", path, **options)
    assert foreign.records.get("pvc-2") is None
    assert [path.name for path in (export.point / "data").iterdir()] == []


@others
def test_a_volume_of_another_one_cannot_be_ended(
    directories: ShareDirectories, export: Export, other: Owner
) -> None:
    """As after a restore into a new cluster, with the same names."""
    make(directories)
    directories.records.publish("pvc-1")
    foreign = export.directories(owner=other)
    record = foreign.records.get("pvc-1")
    assert isinstance(record, AssetRecord)
    for end in (
        lambda: foreign.remove("pvc-1"),
        lambda: foreign.archive("pvc-1", path="data"),
        lambda: foreign.keep("pvc-1"),
        lambda: foreign.discard(record),
        lambda: make(foreign),
    ):
        with pytest.raises(PathTaken, match=r"cluster-1/example\.com/test.*records/pvc-1\.json"):
            end()
    assert (export.point / "data").is_dir()
    # The way out that it names.
    (export.point / PRIVATE / "records/pvc-1.json").unlink()
    foreign.records.read_again()
    assert foreign.remove("pvc-1", path="data").ending is Ending.REMOVED


@others
def test_a_directory_that_another_one_has_adopted_is_not_removed_without_a_record(
    directories: ShareDirectories, export: Export, other: Owner
) -> None:
    """A volume of a predecessor has none; the other one took its directory a moment ago."""
    (export.point / "old").mkdir()
    make(export.directories(owner=other), path="old", adopt=True)
    with pytest.raises(PathTaken, match="belongs to the volume pvc-1"):
        directories.remove("pvc-of-old", path="old")
    assert (export.point / "old").is_dir()


def test_nothing_is_begun_while_nobody_can_say_who_we_are(export: Export) -> None:
    known = export.directories()
    make(known)

    def ask() -> Owner:
        raise OwnerUnknown("no answer")

    share = export.share("unknown")
    unknown = ShareDirectories(share, owner=ask)
    export.stack.callback(unknown.stop)
    unknown.start()
    assert share.wait_looked_at(60.0)
    for call in (
        lambda: make(unknown, "pvc-2", "more"),
        lambda: unknown.remove("pvc-1"),
        unknown.records.unfinished_claims,
        unknown.records.all,
    ):
        with pytest.raises(OwnerUnknown):
            call()
    assert [path.name for path in (export.point / PRIVATE / "new").iterdir()] == []
    assert (export.point / "data").is_dir()
