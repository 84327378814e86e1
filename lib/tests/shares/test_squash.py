"""Servers that map root to another user, and the metrics."""

from __future__ import annotations

import os

import pytest
from prometheus_client import CollectorRegistry

from external_storage.metrics import Metrics
from external_storage.shares import (
    PRIVATE,
    DirectoryRefused,
    Expected,
    Ownership,
    ShareDirectories,
    export_metrics,
)
from external_storage.shares.layout import Site, prepare

from .conftest import OURS, Disk, Export, claim, run, until


def test_a_server_that_maps_us_to_another_user_is_found_out(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root_squash looks: what we make belongs to somebody else than who we are."""
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    expected = Expected(source=export.source, fs_types=frozenset({"tmpfs"}))
    site = Site(base=export.point, expected=expected)
    for _ in range(2):  # the first makes the private directory, the second finds it
        assert prepare(site).our_uid == 0
    assert len(list(export.point.iterdir())) == 1


def test_a_probe_that_a_crash_has_left_is_swept(
    directories: ShareDirectories, export: Export
) -> None:
    left = export.point / f"{PRIVATE}.0123456789abcdef"
    others = [export.point / name for name in (f"{PRIVATE}.mine", f"{PRIVATE}.fedcba9876543210")]
    for path in (left, *others):
        path.mkdir()
    (others[1] / "file").touch()
    for _ in range(2):
        directories.tidy()
    assert not left.exists()
    assert [path.is_dir() for path in others] == [True, True]


def test_one_that_is_known_is_not_made_again_and_again(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    expected = Expected(source=export.source, fs_types=frozenset({"tmpfs"}))
    ours = prepare(Site(base=export.point, expected=expected)).our_uid
    before = export.point.stat().st_mtime_ns
    assert prepare(Site(base=export.point, expected=expected, our_uid=ours)).our_uid == ours
    assert export.point.stat().st_mtime_ns == before


def test_the_error_says_that_the_server_maps_root(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = disk.directories("disk")
    (disk.point / "ns").mkdir()
    run("chattr", "+i", disk.point / "ns")
    try:
        for euid, mapped in ((0, False), (1234, True)):
            monkeypatch.setattr(os, "geteuid", lambda euid=euid: euid)
            with pytest.raises(DirectoryRefused, match="ns/data: Operation not permitted") as told:
                on.make("pvc-1", claim=claim(), path="ns/data", ownership=Ownership())
            assert ("no_root_squash" in str(told.value)) == mapped
    finally:
        run("chattr", "-i", disk.point / "ns")


def test_metrics_tell_of_each_share(export: Export) -> None:
    one = export.directories("one")
    two = ShareDirectories(export.share("two"), owner=lambda: OURS)
    metrics = Metrics(CollectorRegistry())
    export_metrics(metrics, [one, two])

    def value(name: str, share: str) -> float | None:
        return metrics.registry.get_sample_value(f"external_storage_share_{name}", {"share": share})

    assert (value("available", "one"), value("available", "two")) == (1.0, 0.0)
    assert value("size_bytes", "one") == 200 << 20
    assert value("free_bytes", "two") is None
    assert value("worker_kills_total", "one") == 0
    assert value("trash_entries", "one") == 0
    assert value("stuck_workers", "one") == 0
    export.unmount()
    until(lambda: two.problem() and value("available", "two") == 0.0, "never available")
