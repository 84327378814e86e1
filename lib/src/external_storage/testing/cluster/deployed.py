"""A provisioner deployed as an admin does it: its own manifests, its own image."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Final

import yaml

from external_storage.testing.access import ControlPlaneError
from external_storage.testing.cluster.cluster import Cluster
from external_storage.testing.cluster.existing import ExistingCluster
from external_storage.testing.cluster.requirements import ClusterError

Site = Cluster | ExistingCluster

_LIMIT_S: Final = 180
_WORKLOADS: Final = ("DaemonSet", "Deployment", "StatefulSet")


class Deployed:
    """The objects of a package's ``deploy/``; use it as a context manager, which takes them away.

    What a cluster sets otherwise, such as the name of the image, is an overlay of kustomize, as an
    admin would write it; the manifests stay as they are.
    """

    def __init__(
        self,
        site: Site,
        manifests: Path,
        *,
        images: Mapping[str, str] | None = None,
        patches: Sequence[Mapping[str, Any]] = (),
        limit_s: float = _LIMIT_S,
    ) -> None:
        """``manifests``: a directory with ``kustomization.yaml``. ``images``: references of images
        by the names that the manifests call them. ``patches``: as in ``kustomization.yaml``.
        ``limit_s``: until all pods are ready, or gone."""
        self._limit_s = round(limit_s)
        self.site = site
        self._overlay = tempfile.TemporaryDirectory(prefix="external-storage-overlay-")
        # A base may be anywhere, but not be given by an absolute path.
        base = os.path.relpath(manifests, Path(self._overlay.name).resolve())
        content: dict[str, Any] = {"resources": [base], "images": [], "patches": [*patches]}
        for name, reference in (images or {}).items():
            new_name, _, tag = reference.rpartition(":")
            content["images"].append({"name": name, "newName": new_name, "newTag": tag})
        self._workloads = self._render(content)
        if not self._workloads:
            raise ClusterError(f"{manifests}: there is none of {', '.join(_WORKLOADS)} in it")
        if isinstance(site, Cluster):
            content["patches"] += _without_capabilities(self._workloads, site.lacks_capabilities)
            self._workloads = self._render(content)
        self.namespace: Final = str(self._workloads[0]["metadata"]["namespace"])
        """The provisioner's own."""

    def _render(self, overlay: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Write the overlay; the workloads that it makes."""
        Path(self._overlay.name, "kustomization.yaml").write_text(json.dumps(overlay))
        rendered = yaml.safe_load_all(self.site.kubectl("kustomize", self._overlay.name))
        return [made for made in rendered if made["kind"] in _WORKLOADS]

    def __enter__(self) -> Deployed:
        try:
            self.site.kubectl("apply", "--kustomize", self._overlay.name)
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete the objects and wait until they are gone."""
        flags = ("--ignore-not-found", f"--timeout={self._limit_s}s")
        try:
            self.site.kubectl(
                "delete", "-k", self._overlay.name, *flags, limit_s=self._limit_s + 10
            )
        finally:
            self._overlay.cleanup()

    def wait_ready(self) -> None:
        """Wait until every pod that is wanted is ready. ``ClusterError`` says what hinders them."""
        for workload in self._workloads:
            name = f"{workload['kind']}/{workload['metadata']['name']}".lower()
            try:
                status = ("rollout", "status", name, f"--timeout={self._limit_s}s")
                self.kubectl(*status, limit_s=self._limit_s + 10)
            except ControlPlaneError as error:
                raise ClusterError(f"{error}\n{self.explain()}") from None

    def explain(self) -> str:
        """The state of its pods and the end of their logs."""
        selector = f"--namespace={self.namespace}"
        pods = self.site.kubectl("describe", "pods", selector)
        flags = ("--all-containers", "--prefix", "--tail=40")
        logs = [self.kubectl("logs", pod, *flags) for pod in self.pods()]
        return "\n".join([pods, *logs])

    def kubectl(self, *args: str, input: str | None = None, limit_s: float = 60.0) -> str:
        """kubectl in the provisioner's namespace."""
        return self.site.kubectl("-n", self.namespace, *args, input=input, limit_s=limit_s)

    def pods(self) -> list[str]:
        """The names of its pods as ``pod/name``."""
        return self.kubectl("get", "pods", "-o", "name").split()

    def kill(self) -> None:
        """Kill its pods without a word, as a node's failure would; it is started again."""
        self.kubectl("delete", "--force", "--grace-period=0", *self.pods())


def refuse_occupied(site: Site, manifests: Path) -> None:
    """``ClusterError`` if something of a package's ``deploy/`` is on the cluster: it is somebody's,
    and would be changed, and deleted at the end."""
    found = site.kubectl("get", "-k", str(manifests), "--ignore-not-found", "-o", "name").split()
    if found:
        raise ClusterError(
            f"there is already {', '.join(found)}: the scenario would take it over and delete it "
            f"with its data. Use another cluster; or, if it was left by a scenario: kubectl delete "
            f"-k {manifests}"
        )


def _without_capabilities(
    workloads: Iterable[Mapping[str, Any]], lacking: Set[str]
) -> Iterator[dict[str, Any]]:
    """Patches that take from containers what this machine could not give to any process."""
    for workload in workloads:
        for number, container in enumerate(workload["spec"]["template"]["spec"]["containers"]):
            added = container.get("securityContext", {}).get("capabilities", {}).get("add", [])
            if lacking & set(added):
                path = f"/spec/template/spec/containers/{number}/securityContext/capabilities/add"
                value = [name for name in added if name not in lacking]
                target = {"kind": workload["kind"], "name": workload["metadata"]["name"]}
                patch = json.dumps([{"op": "replace", "path": path, "value": value}])
                yield {"target": target, "patch": patch}
