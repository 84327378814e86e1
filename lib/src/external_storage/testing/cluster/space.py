"""What users of a cluster do: claims and pods in a namespace of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from external_storage.kube.quantity import to_bytes
from external_storage.kube.types import PersistentVolume, PersistentVolumeClaim
from external_storage.testing.access import ControlPlaneError
from external_storage.testing.cluster.deployed import Site
from external_storage.testing.waiting import wait_until

# Far above what anything takes, also in an emulated guest: waited out where something never comes.
_LIMIT_S: Final = 300
_WAIT: Final = f"--timeout={_LIMIT_S}s"


@dataclass(frozen=True, slots=True)
class Space:
    """One namespace; ``delete`` removes it with all it holds."""

    site: Site
    name: str

    @classmethod
    def create(cls, site: Site, name: str) -> Space:
        """Make the namespace; pods may do anything in it."""
        site.kubectl("create", "namespace", name)
        level = "pod-security.kubernetes.io/enforce=privileged"
        site.kubectl("label", "namespace", name, level)
        return cls(site, name)

    def delete(self) -> None:
        """Delete it, and wait until pods and claims in it are gone."""
        self.kubectl("delete", "pods,persistentvolumeclaims", "--all", _WAIT, limit_s=_LIMIT_S + 10)
        self.site.kubectl("delete", "namespace", self.name, "--wait=false")

    def kubectl(self, *args: str, input: str | None = None, limit_s: float = 60.0) -> str:
        """kubectl in this namespace."""
        return self.site.kubectl("-n", self.name, *args, input=input, limit_s=limit_s)

    # -- claims

    def claim(self, name: str, storage_class: str, **spec: Any) -> None:  # noqa: ANN401
        """Make a claim of 1 Mi, ReadWriteMany unless ``spec`` says other things."""
        body = {
            "metadata": {"name": name},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "storageClassName": storage_class,
                "resources": {"requests": {"storage": "1Mi"}},
                **spec,
            },
        }
        self.site.client.create(PersistentVolumeClaim, body, namespace=self.name)

    def bound(self, name: str) -> PersistentVolume:
        """Wait until the claim is Bound; its volume."""
        self._wait(f"pvc/{name}", "--for=jsonpath={.status.phase}=Bound")
        claim = self.site.client.get(PersistentVolumeClaim, name, namespace=self.name)
        return self.site.client.get(PersistentVolume, claim.spec.volume_name)

    def capacity(self, name: str) -> int:
        """The bytes that a Bound claim's status says it has; 0 while it is being expanded."""
        status = self.site.client.get(PersistentVolumeClaim, name, namespace=self.name).status
        return 0 if status.allocated_resource_statuses else to_bytes(status.capacity["storage"])

    def delete_claim(self, name: str) -> None:
        """Delete a claim, and wait until the volume it was bound to is gone too."""
        claim = self.site.client.get(PersistentVolumeClaim, name, namespace=self.name)
        self.kubectl("delete", "pvc", name, _WAIT, limit_s=_LIMIT_S + 10)
        volume = claim.spec.volume_name
        if volume:
            gone = ("get", "pv", volume, "--ignore-not-found", "-o", "name")
            wait_until(
                lambda: not self.site.kubectl(*gone),
                f"the volume {volume} is gone",
                explain=lambda: self.site.kubectl("describe", "pv", volume),
            )

    # -- pods

    def start(
        self,
        name: str,
        script: str,
        *,
        claims: Mapping[str, str] | None = None,
        node: str | None = None,
        **spec: Any,  # noqa: ANN401
    ) -> None:
        """Make a pod that runs ``script`` in a shell once, with claims mounted where told.

        ``claims``: their names, by the path each is mounted at. ``node``: where it has to run.
        """
        mounts, volumes = spec.pop("mounts", []), spec.pop("volumes", [])
        for number, (path, claim) in enumerate((claims or {}).items()):
            volume = f"claim-{number}"
            mounts.append({"name": volume, "mountPath": path})
            volumes.append({"name": volume, "persistentVolumeClaim": {"claimName": claim}})
        container = {
            "name": "main",
            "image": self.site.tools_image,
            "imagePullPolicy": "IfNotPresent",
            "command": ["sh", "-c", script],
            "volumeMounts": mounts,
            **spec.pop("container", {}),
        }
        where = {"kubernetes.io/hostname": node} if node else {}
        body = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "nodeSelector": where,
            "containers": [container],
            "volumes": volumes,
            **spec,
        }
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": body}
        self.kubectl("create", "-f", "-", input=json.dumps(pod))

    def running(self, name: str) -> None:
        """Wait until the pod runs and is ready."""
        self._wait(f"pod/{name}", "--for=condition=Ready")

    def ended(self, name: str) -> str:
        """Wait until the pod has ended well; what it printed."""
        # However it has ended: one that has failed is not to be waited for.
        terminated = "{.status.containerStatuses[0].state.terminated}"
        self._wait(f"pod/{name}", f"--for=jsonpath={terminated}")
        code = self.kubectl("get", "pod", name, "-o", f"jsonpath={terminated[:-1]}.exitCode}}")
        printed = self.kubectl("logs", name)
        if code != "0":
            told = self.kubectl("describe", "pod", name)
            raise AssertionError(f"pod {name} has failed; it printed:\n{printed}\n{told}")
        return printed

    def run(self, name: str, script: str, **options: Any) -> str:  # noqa: ANN401
        """``start``, ``ended``, and the pod is deleted; what it printed."""
        self.start(name, script, **options)
        printed = self.ended(name)
        self.kubectl("delete", "pod", name, _WAIT, limit_s=_LIMIT_S + 10)
        return printed

    def on_node(self, node: str, script: str) -> str:
        """Run ``script`` with the node's files below ``/node``; what it printed."""
        mount = {"name": "node", "mountPath": "/node"}
        volume = {"name": "node", "hostPath": {"path": "/"}}
        return self.run("on-node", script, node=node, mounts=[mount], volumes=[volume])

    def _wait(self, what: str, condition: str) -> None:
        try:
            self.kubectl("wait", what, condition, _WAIT, limit_s=_LIMIT_S + 10)
        except ControlPlaneError as error:
            told = self.kubectl("describe", what)
            raise AssertionError(f"{error}\n{told}") from None
