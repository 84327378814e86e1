"""A cluster that runs pods: what pods get there is what they get anywhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import external_storage
from external_storage.testing import Cluster, ControlPlaneError
from external_storage.testing.cluster import layout
from external_storage.testing.cluster.images import write_images
from external_storage.testing.waiting import wait_until

from .conftest import WAIT, pod

EXAMPLE = Path(__file__).parents[2] / "examples" / "hostpath"


def run_pod(cluster: Cluster, space: str, name: str, script: str, **spec: Any) -> None:
    """Make the pod and wait until it runs."""
    cluster.kubectl("-n", space, "apply", "-f", "-", input=pod(name, script, **spec))
    cluster.kubectl("-n", space, "wait", "--for=condition=Ready", f"pod/{name}", WAIT)


def of_pod(cluster: Cluster, space: str, name: str, path: str) -> str:
    return cluster.kubectl("-n", space, "get", "pod", name, "-o", f"jsonpath={{{path}}}")


def test_the_node_is_ready_and_takes_pods(cluster: Cluster) -> None:
    node = json.loads(cluster.kubectl("get", "node", cluster.node_name, "-o", "json"))
    (ready,) = (c for c in node["status"]["conditions"] if c["type"] == "Ready")
    assert ready["status"] == "True"
    assert "taints" not in node["spec"]
    served = json.loads(cluster.kubectl("get", "--raw", "/version"))["gitVersion"]
    assert node["status"]["nodeInfo"]["kubeletVersion"] == served


def test_a_pod_runs_with_an_image_that_was_loaded(
    cluster: Cluster, space: str, tmp_path: Path
) -> None:
    image = "localhost/loaded-by-test:1"
    write_images(tmp_path / "image.tar", {image: ("sh", "-c", "echo by default; sleep 1000")})
    assert cluster.load_image(tmp_path / "image.tar") == [image]
    container = {"image": image, "command": None}
    cluster.kubectl("-n", space, "apply", "-f", "-", input=pod("a", "", container=container))
    cluster.kubectl("-n", space, "wait", "--for=condition=Ready", "pod/a", WAIT)
    assert cluster.kubectl("-n", space, "logs", "a") == "by default\n"


def test_an_image_that_was_not_loaded_is_told_by_its_name(cluster: Cluster, space: str) -> None:
    container = {"image": "localhost/never-loaded:1"}
    cluster.kubectl("-n", space, "apply", "-f", "-", input=pod("a", "", container=container))
    path = ".status.containerStatuses[0].state.waiting.message"
    said = wait_until(lambda: of_pod(cluster, space, "a", path), "the pod says why it waits")
    assert "localhost/never-loaded:1" in said


def test_logs_and_exec_through_the_kubeconfig(cluster: Cluster, space: str) -> None:
    run_pod(cluster, space, "a", "echo started; sleep 1000")
    assert cluster.kubectl("-n", space, "logs", "a") == "started\n"
    command = ("exec", "-i", "a", "--", "sh", "-c", "tr a-z A-Z; hostname")
    assert cluster.kubectl("-n", space, *command, input="shout ") == "SHOUT a\n"


def test_probes_decide_whether_a_pod_is_ready(cluster: Cluster, space: str) -> None:
    probe = {"exec": {"command": ["test", "-e", "/tmp/ready"]}, "periodSeconds": 1}
    spec = pod("a", "sleep 1000", container={"readinessProbe": probe})
    cluster.kubectl("-n", space, "apply", "-f", "-", input=spec)
    cluster.kubectl("-n", space, "wait", "--for=jsonpath={.status.phase}=Running", "pod/a", WAIT)
    ready = '.status.conditions[?(@.type=="Ready")].status'
    assert of_pod(cluster, space, "a", ready) == "False"
    cluster.kubectl("-n", space, "exec", "a", "--", "touch", "/tmp/ready")
    cluster.kubectl("-n", space, "wait", "--for=condition=Ready", "pod/a", WAIT)


def test_a_service_leads_to_its_pods(cluster: Cluster, space: str) -> None:
    run_pod(cluster, space, "server", "while :; do echo served | nc -l -p 7000; done")
    cluster.kubectl("-n", space, "expose", "pod", "server", "--port=70", "--target-port=7000")
    address = cluster.kubectl(
        "-n", space, "get", "service", "server", "-o=jsonpath={.spec.clusterIP}"
    )
    ask = f"until nc -w 5 {address} 70 </dev/null; do sleep 0.1; done"
    run_pod(cluster, space, "client", f"{ask}; sleep 1000")
    wait_until(lambda: cluster.kubectl("-n", space, "logs", "client"), "the client is answered")
    assert cluster.kubectl("-n", space, "logs", "client") == "served\n"
    # And from the node itself, which mounts what a Service leads to.
    assert cluster.run("sh", "-c", f"busybox nc -w 5 {address} 70 </dev/null") == "served\n"


def test_a_provisioner_in_a_pod_serves_claims_with_the_credentials_of_its_pod(
    cluster: Cluster,
) -> None:
    cluster.run("mkdir", "-p", "/srv/hostpath")
    cluster.kubectl("apply", "-f", str(EXAMPLE / "rbac.yaml"), "-f", str(EXAMPLE / "class.yaml"))
    sources = [
        {"serviceAccountToken": {"path": "token"}},
        {"configMap": {"name": "kube-root-ca.crt"}},
        {
            "downwardAPI": {
                "items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]
            }
        },
    ]
    # With the node's files as its root it needs no image of its own.
    mounts = [
        {"name": "node", "mountPath": "/node"},
        {"name": "token", "mountPath": "/node/run/secrets/kubernetes.io/serviceaccount"},
    ]
    source = Path(external_storage.__file__).parents[1]
    command = f"PYTHONPATH={source} exec chroot /node {sys.executable} {EXAMPLE}/hostpath.py"
    spec = pod(
        "provisioner",
        f"{command} --root=/srv/hostpath",
        serviceAccountName="hostpath",
        automountServiceAccountToken=False,
        container={"volumeMounts": mounts},
        volumes=[
            {"name": "node", "hostPath": {"path": "/"}},
            {"name": "token", "projected": {"sources": sources}},
        ],
    )
    cluster.kubectl("-n", "hostpath", "apply", "-f", "-", input=spec)
    try:
        cluster.kubectl("-n", "hostpath", "apply", "-f", str(EXAMPLE / "claim.yaml"))
        bound = ("wait", "--for=jsonpath={.status.phase}=Bound", "pvc/data", WAIT)
        cluster.kubectl("-n", "hostpath", *bound)
        assert cluster.run("ls", "/srv/hostpath").startswith("pvc-")
        mount = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
        claimed = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
        script = "echo kept > /data/file; sleep 1000"
        run_pod(cluster, "hostpath", "user", script, container=mount, volumes=claimed)
        assert cluster.run("sh", "-c", "cat /srv/hostpath/pvc-*/file") == "kept\n"
    finally:
        cluster.kubectl("-n", "hostpath", "delete", "pod/user", "pvc/data", "--ignore-not-found")
        gone = ("wait", "--for=delete", "persistentvolumes", "--all", WAIT)
        cluster.kubectl(*gone)
        cluster.kubectl("delete", "-f", str(EXAMPLE / "rbac.yaml"), "--ignore-not-found")
    assert cluster.run("ls", "/srv/hostpath") == ""


def test_pods_outlive_the_kubelet(cluster: Cluster, space: str) -> None:
    run_pod(cluster, space, "a", "sleep 1000")
    path = ".status.containerStatuses[0]['containerID', 'restartCount']"
    before = of_pod(cluster, space, "a", path)
    assert before.startswith("containerd://")
    assert before.endswith(" 0")
    killed = cluster.pids["kubelet"]
    cluster.kill_kubelet()
    assert "kubelet" not in cluster.pids
    with pytest.raises(ControlPlaneError, match="exec"):
        cluster.kubectl("-n", space, "exec", "a", "--", "true")
    cluster.start_kubelet()
    assert cluster.pids["kubelet"] != killed

    def can_exec() -> bool:
        try:
            cluster.kubectl("-n", space, "exec", "a", "--", "true")
        except ControlPlaneError as error:
            # It has told that it is ready, and may not have read the list of its pods yet.
            if "pod does not exist" not in str(error):
                raise
            return False
        return True

    wait_until(can_exec, "commands run in the pod again")
    assert of_pod(cluster, space, "a", path) == before


def test_nothing_of_it_is_seen_on_the_machine(cluster: Cluster) -> None:
    assert layout.BRIDGE in cluster.run("ls", "/sys/class/net").split()
    assert not Path("/sys/class/net", layout.BRIDGE).exists()
    for place in ("/srv", "/mnt", "/etc", "/var/lib", "/var/log", "/run"):
        name = f"{place}/external-storage-cluster-test"
        cluster.run("touch", name)
        assert not Path(name).exists()
    # While what is told through the file system, such as a test's own directory, is the same.
    assert cluster.run("cat", __file__) == Path(__file__).read_text()


def test_what_fails_in_it_is_told_with_its_words(cluster: Cluster) -> None:
    with pytest.raises(ControlPlaneError, match=r"cat /nowhere: exited with 1: .*No such file"):
        cluster.run("cat", "/nowhere")
    with pytest.raises(ControlPlaneError, match="sleep 60: no end in 0 s"):
        cluster.run("sleep", "60", limit_s=0.1)
