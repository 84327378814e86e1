"""Scenarios on a cluster that is there: they leave alone what they did not make."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from external_storage.testing import ControlPlane
from external_storage.testing.cluster.deployed import refuse_occupied
from external_storage.testing.cluster.existing import ExistingCluster
from external_storage.testing.cluster.requirements import ClusterError

MANIFESTS = """
apiVersion: v1
kind: Namespace
metadata: {name: an-installation}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: an-installation}
---
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: an-installation}
provisioner: example.com/an-installation
"""


@pytest.fixture
def site(control_plane: ControlPlane) -> Iterator[ExistingCluster]:
    made = ExistingCluster(control_plane.kubeconfig, tools_image="none")
    yield made
    made.close()


def test_an_installation_that_is_there_is_not_taken_over(
    site: ExistingCluster, tmp_path: Path
) -> None:
    (tmp_path / "all.yaml").write_text(MANIFESTS)
    (tmp_path / "kustomization.yaml").write_text("resources: [all.yaml]")
    refuse_occupied(site, tmp_path)
    site.kubectl("create", "-f", str(tmp_path / "all.yaml"))
    try:
        with pytest.raises(
            ClusterError, match=r"already namespace/an-installation, .*configmap/settings"
        ):
            refuse_occupied(site, tmp_path)
        site.kubectl("delete", "namespace", "an-installation", "--wait=false")
        with pytest.raises(ClusterError, match=r"storageclass\.storage\.k8s\.io/an-installation"):
            refuse_occupied(site, tmp_path)
    finally:
        site.kubectl("delete", "-k", str(tmp_path), "--ignore-not-found", "--wait=false")
