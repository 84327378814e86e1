"""A cluster that is there already, used as ``Cluster`` is by scenarios."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.testing import binaries
from external_storage.testing.access import run_kubectl
from external_storage.testing.cluster.requirements import ClusterError


class ExistingCluster:
    """Nothing of it is started or stopped; its images come from where its nodes pull them."""

    def __init__(self, kubeconfig: Path, *, tools_image: str) -> None:
        """``tools_image``: one with a shell and the usual commands, such as busybox."""
        self.kubeconfig = kubeconfig.absolute()
        self.tools_image = tools_image
        # The cluster's owner has one that fits it.
        found = shutil.which("kubectl")
        self._kubectl = Path(found) if found else binaries.ensure()["kubectl"]
        self._cache = tempfile.TemporaryDirectory(prefix="external-storage-kubectl-")
        self.client = Client(auth.load(kubeconfig=str(self.kubeconfig)))
        """A client with the rights of the kubeconfig."""

    def close(self) -> None:
        """Let go of it."""
        self.client.close()
        self._cache.cleanup()

    def kubectl(self, *args: str, input: str | None = None, limit_s: float = 60.0) -> str:
        """See ``Cluster.kubectl``."""
        command = [str(self._kubectl), "--kubeconfig", str(self.kubeconfig)]
        cache = Path(self._cache.name)
        return run_kubectl(command, args, cache=cache, input=input, limit_s=limit_s)

    @property
    def node_name(self) -> str:
        """The first node that pods can be scheduled to. ``ClusterError`` when there is none."""
        nodes = json.loads(self.kubectl("get", "nodes", "-o", "json"))["items"]
        for node in nodes:
            spec = node["spec"]
            if not spec.get("unschedulable") and not spec.get("taints"):
                return str(node["metadata"]["name"])
        raise ClusterError(f"none of the {len(nodes)} nodes takes pods")

    @property
    def kernel_node_name(self) -> str:
        """A node whose kernel mounts NFS and iSCSI: any, by default."""
        return self.node_name
