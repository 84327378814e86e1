"""How much is in the volumes, as the metrics tell it."""

from __future__ import annotations

from typing import Any


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
