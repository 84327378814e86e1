"""The manifests on a real control plane, and the agent with the rights that they give it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from external_storage.kube.types import Node as PlainNode
from external_storage.testing import ControlPlane, FaultProxy
from local_volume_provisioner import config
from local_volume_provisioner.node import Node as NodeObject

DEPLOY = Path(__file__).parents[2] / "deploy"
NAME = "local-volume-provisioner"


@pytest.fixture(scope="module")
def plane(control_plane: ControlPlane) -> ControlPlane:
    for name in ("namespace.yaml", "rbac.yaml"):
        control_plane.kubectl("apply", "-f", str(DEPLOY / name))
    return control_plane


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


@pytest.mark.parametrize("directory", ["deploy", "deploy-directories-only", "deploy/taint"])
def test_manifests_are_accepted_by_the_api_server(plane: ControlPlane, directory: str) -> None:
    plane.kubectl("apply", "--dry-run=server", "-k", str(DEPLOY.parent / directory))


def test_examples_are_accepted_by_the_api_server(plane: ControlPlane) -> None:
    for name in ("claim.yaml", "pod.yaml"):
        plane.kubectl("apply", "--dry-run=server", "-f", str(DEPLOY / "examples" / name))


def test_directories_only_has_no_privilege_and_no_device(plane: ControlPlane) -> None:
    shown = plane.kubectl("kustomize", str(DEPLOY.parent / "deploy-directories-only"))
    (made,) = [doc for doc in yaml.safe_load_all(shown) if doc["kind"] == "DaemonSet"]
    (container,) = made["spec"]["template"]["spec"]["containers"]
    assert "privileged" not in container["securityContext"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert not mounts & {"/dev", "/run/udev"}
    assert "/mnt/local-disks" in mounts


def test_the_configuration_fits_the_daemonset_and_the_classes() -> None:
    (map_,) = documents("configmap.yaml")
    found = config.parse(map_["data"])
    (made,) = documents("daemonset.yaml")
    (container,) = made["spec"]["template"]["spec"]["containers"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    hosts = {
        v["name"]: v.get("hostPath", {}).get("path")
        for v in made["spec"]["template"]["spec"]["volumes"]
    }
    for kind in found.classes.values():
        mount = mounts[kind.mount_dir]
        assert mount["mountPropagation"] == "HostToContainer"
        assert hosts[mount["name"]] == kind.host_dir
    assert {doc["metadata"]["name"] for doc in documents("class.yaml")} == set(found.classes)


def test_it_sees_what_pods_use_and_no_taint_keeps_it_away() -> None:
    (made,) = documents("daemonset.yaml")
    spec = made["spec"]["template"]["spec"]
    assert spec["tolerations"] == [{"operator": "Exists"}]
    mounts = {mount["mountPath"]: mount for mount in spec["containers"][0]["volumeMounts"]}
    assert mounts["/var/lib/kubelet/pods"]["mountPropagation"] == "HostToContainer"
    # A hole in that would be silent: the agent then takes every volume for unused.
    (source,) = [v["hostPath"] for v in spec["volumes"] if v["name"] == "pods"]
    assert source == {"path": "/var/lib/kubelet/pods", "type": "Directory"}


def test_the_agents_may_not_change_nodes_unless_that_is_applied(plane: ControlPlane) -> None:
    """L11: the reference's pods may update every node."""
    assert [rule["verbs"] for doc in documents("rbac.yaml") if doc["kind"] == "ClusterRole"
            for rule in doc["rules"] if "nodes" in rule["resources"]] == [["get"]]  # fmt: skip


def test_a_volume_lives_and_dies_under_the_deployed_account(
    plane: ControlPlane, node: Any, proxy: FaultProxy
) -> None:
    """With the rights of deploy/ and the capabilities of deploy-directories-only/."""
    node.agent.kubeconfig = proxy.kubeconfig(for_=plane.service_account_kubeconfig(NAME, NAME))
    if os.geteuid() == 0:
        node.agent.wrapper = ("setpriv", "--bounding-set=-all,+dac_override,+fowner")
    node.class_()
    taint = {"key": "not-ready", "effect": "NoSchedule"}
    node.api.patch(PlainNode, node.name, {"spec": {"taints": [taint]}})
    top = {"removeNodeNotReadyTaint": True, "provisionerNotReadyNodeTaintKey": "not-ready"}
    node.configure(top=top, _={})
    mounted = node.tmpfs("m")
    node.agent.start()
    old = node.bind("m")
    (mounted / "file").write_text("x")
    os.chown(mounted / "file", 1000, 1000)
    (mounted / "locked").mkdir(mode=0o000)
    node.release("m")
    node.volume("m", other_than=old.uid)
    assert list(mounted.iterdir()) == []
    node.wait_event("Cleaned")
    # No right to change a node was given: it is told, and the rest goes on.
    assert "403" in node.wait_event("TaintNotRemoved").message
    plane.kubectl("apply", "-k", str(DEPLOY / "taint"))
    node.link("wake", "/dev/null")
    node.wait(lambda: not node.api.get(NodeObject, node.name).spec.taints, "the taint is gone")
    plane.kubectl("delete", "-k", str(DEPLOY / "taint"))
