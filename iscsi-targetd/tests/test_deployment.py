"""The manifests on a real control plane: what they are, and what they allow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from external_storage.kube.client import Client
from external_storage.kube.types import Node
from external_storage.testing import ControlPlane, ControlPlaneError
from external_storage.testing.waiting import wait_until
from iscsi_targetd_provisioner.initiators import ANNOTATION
from iscsi_targetd_provisioner.servers import read_servers

DEPLOY = Path(__file__).parents[1] / "deploy"
NODE = "iscsi-agents-own-node"
CAPACITY_VERBS = ("list", "create", "patch", "delete")
AGENT = "system:serviceaccount:iscsi-targetd-provisioner:iscsi-targetd-node-agent"


@pytest.fixture(scope="module")
def plane(control_plane: ControlPlane) -> ControlPlane:
    control_plane.kubectl("apply", "-f", str(DEPLOY / "namespace.yaml"))
    return control_plane


def test_manifests_are_accepted_by_the_api_server(plane: ControlPlane) -> None:
    plane.kubectl("apply", "--dry-run=server", "-k", str(DEPLOY))
    for name in ("chap.yaml", "examples/claim.yaml", "examples/pod.yaml"):
        plane.kubectl("apply", "--dry-run=server", "-f", str(DEPLOY / name))


def test_the_example_of_servers_is_a_good_one(tmp_path: Path) -> None:
    shipped = yaml.safe_load((DEPLOY / "servers.yaml").read_text())["data"]["servers.yaml"]
    (tmp_path / "servers.yaml").write_text(shipped)
    assert set(read_servers(tmp_path / "servers.yaml")) == {"storage1"}


def test_every_file_of_the_servers_is_mounted() -> None:
    shipped = (DEPLOY / "servers.yaml").read_text()
    manifest = yaml.safe_load((DEPLOY / "deployment.yaml").read_text())
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    for line in shipped.splitlines():
        if "/etc/" in line:
            assert str(Path(line.split()[-1]).parent) in mounted


def test_the_provisioner_may_tell_the_scheduler_what_is_left(plane: ControlPlane) -> None:
    plane.kubectl("apply", "-f", str(DEPLOY / "rbac.yaml"))
    who = "--as=system:serviceaccount:iscsi-targetd-provisioner:iscsi-targetd-provisioner"
    where = "--namespace=iscsi-targetd-provisioner"
    for verb, what in (
        ("get", "csidrivers.storage.k8s.io/iscsi-targetd"),
        *((verb, "csistoragecapacities.storage.k8s.io") for verb in CAPACITY_VERBS),
    ):
        assert plane.kubectl("auth", "can-i", verb, what, who, where).strip() == "yes"


def test_the_node_agent_runs_wherever_a_pod_with_a_volume_may() -> None:
    manifests = yaml.safe_load_all((DEPLOY / "node-agent.yaml").read_text())
    [spec] = [m["spec"]["template"]["spec"] for m in manifests if m["kind"] == "DaemonSet"]
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert spec["nodeSelector"] == {"kubernetes.io/os": "linux"}


@pytest.fixture(scope="module")
def policy(plane: ControlPlane) -> Iterator[None]:
    """With its policy."""
    plane.kubectl("apply", "-f", str(DEPLOY / "node-agent.yaml"))
    yield
    plane.kubectl("delete", "-f", str(DEPLOY / "node-agent.yaml"), "--wait=false")


def as_agent(plane: ControlPlane, node: str, patch: str, *, bound_to: str = NODE) -> str:
    """Patch a node as the agent of another, or the same, one."""
    extra = f"--as-user-extra=authentication.kubernetes.io/node-name={bound_to}"
    return plane.kubectl("patch", "node", node, f"--as={AGENT}", extra, "--patch", patch)


@pytest.fixture
def node(client: Client) -> Iterator[str]:
    made = client.create(Node, {"metadata": {"name": NODE, "annotations": {"other": "1"}}})
    yield NODE
    client.delete(Node, NODE, uid=made.uid)


def annotated(**notes: Any) -> str:
    return yaml.safe_dump({"metadata": {"annotations": notes}})


@pytest.mark.usefixtures("policy")
def test_the_node_agent_may_change_one_annotation_of_its_own_node(
    plane: ControlPlane, client: Client, node: str
) -> None:
    def in_force() -> bool:
        """It takes the API server a moment to see a policy."""
        try:
            as_agent(plane, node, annotated(other="1", new="1"), bound_to="another")
        except ControlPlaneError:
            return True
        client.patch(Node, node, {"metadata": {"annotations": {"new": None}}})
        return False

    wait_until(in_force, "the policy is in force")
    good = annotated(**{ANNOTATION: "iqn.2026-01.com.example:one"})
    as_agent(plane, node, good)
    found = client.get(Node, node).metadata.annotations
    assert found[ANNOTATION] == "iqn.2026-01.com.example:one"
    refused = {
        "its own node only": (annotated(**{ANNOTATION: "iqn.2026-01.com.example:x"}), "another"),
        "the annotation with the initiator only": (annotated(other="2"), NODE),
        "annotation with the initiator only": (annotated(other=None), NODE),
        "initiator only": (yaml.safe_dump({"metadata": {"labels": {"role": "admin"}}}), NODE),
        "may change the annotation": (yaml.safe_dump({"spec": {"unschedulable": True}}), NODE),
    }
    for words, (patch, bound_to) in refused.items():
        with pytest.raises(ControlPlaneError, match=words):
            as_agent(plane, node, patch, bound_to=bound_to)
    assert client.get(Node, node).metadata.annotations == found
