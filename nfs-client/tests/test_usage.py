"""How much is in the volumes, as the metrics tell it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from nfs_client_provisioner import usage


def test_the_usage_of_each_volume_is_a_metric_until_it_is_gone(site: Any, wait_until: Any) -> None:
    volume = site.provision(site.request(pathPattern="ns/data"))
    directory = site.directory(volume)
    (directory / "below").mkdir()
    (directory / "below" / "file").write_bytes(b"x" * 100_000)
    registry = site.provisioner.context.metrics.registry
    labels = {"server": "one", "namespace": "ns", "claim": "data", "volume": volume.name}

    def files() -> float | None:
        found: float | None = registry.get_sample_value("nfs_client_volume_files", labels)
        return found

    assert files() is None
    site.provisioner.reconcile([volume])
    wait_until(lambda: files() is not None, "the volume is counted")
    assert files() == 2
    assert registry.get_sample_value("nfs_client_volume_used_bytes", labels) >= 100_000
    site.provisioner.reconcile([])
    assert files() is None


def test_it_is_counted_again_when_the_interval_is_over_without_being_told(
    site_on: Any, share: Any, wait_until: Any
) -> None:
    site = site_on(share, flags={"usage_interval": "0.05"})
    volume = site.provision(site.request(pathPattern="ns/data"))
    registry = site.provisioner.context.metrics.registry
    labels = {"server": "one", "namespace": "ns", "claim": "data", "volume": volume.name}

    def files() -> float | None:
        found: float | None = registry.get_sample_value("nfs_client_volume_files", labels)
        return found

    site.provisioner.reconcile([volume])
    wait_until(lambda: files() == 0, "it is counted")
    (site.directory(volume) / "file").touch()
    wait_until(lambda: files() == 1, "it is counted again")


def test_a_replica_that_does_not_lead_any_more_tells_nothing(
    site: Any, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = site.provision(site.request())
    site.provisioner.reconcile([volume])

    def told() -> int:
        size, _ = site.provisioner._usage.collect()
        return len(size.samples)

    wait_until(told, "the volume is counted")
    late = time.monotonic() + usage._STALE_S
    monkeypatch.setattr(site.provisioner._usage, "_clock", lambda: late)
    assert told() == 0
