"""nfs-provisioner as an admin deploys it and users use it."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from external_storage.testing.cluster.deployed import Deployed, Site
from external_storage.testing.cluster.space import Space
from external_storage.testing.waiting import wait_until

ROOT = "/srv/nfs-provisioner"
LABEL = "nfs.external-storage/server"
CLASS = "nfs"
TEMPLATE = "/spec/template/spec"


@pytest.fixture(scope="module")
def prepared(site: Site) -> Iterator[None]:
    """What the README asks an admin for: a directory, which must be new, and a label."""
    node = site.node_name
    _on_node(site, node, f"mkdir -p /node{Path(ROOT).parent} && mkdir /node{ROOT}")
    site.kubectl("label", "node", node, f"{LABEL}=true")
    yield
    site.kubectl("label", "node", node, f"{LABEL}-")
    _on_node(site, node, f"rm -r /node{ROOT}")


def _on_node(site: Site, node: str, script: str) -> None:
    admin = Space.create(site, f"nfs-scenario-{uuid.uuid4().hex[:8]}")
    try:
        admin.on_node(node, script)
    finally:
        admin.delete()


@pytest.fixture(scope="module")
def patches(site: Site) -> Sequence[Mapping[str, Any]]:
    """Shorter waits after a restart of the server; and what the README says for old containerds."""
    waits = ("--grace-period=10", "--lease-lifetime=10")
    changes = [{"op": "add", "path": f"{TEMPLATE}/containers/0/args/-", "value": w} for w in waits]
    if _has_old_containerd(site):
        seccomp = f"{TEMPLATE}/securityContext/seccompProfile/type"
        changes.append({"op": "replace", "path": seccomp, "value": "Unconfined"})
    return [{"target": {"kind": "Deployment"}, "patch": json.dumps(changes)}]


def _has_old_containerd(site: Site) -> bool:
    """Whether a node has one whose seccomp profile refuses file handles, as Debian 12's does."""
    path = "{.items[*].status.nodeInfo.containerRuntimeVersion}"
    runtimes = site.kubectl("get", "nodes", "-o", f"jsonpath={path}").split()
    found = (re.match(r"containerd://(\d+)\.(\d+)\.(\d+)", runtime) for runtime in runtimes)
    return any(match and tuple(map(int, match.groups())) < (1, 6, 22) for match in found)


def directories(deployed: Deployed) -> list[str]:
    """The volumes that the server has on its disk."""
    listed = deployed.kubectl("exec", "deployment/nfs-provisioner", "--", "ls", "/export")
    return listed.split()


def test_a_claim_becomes_a_directory_and_goes_with_it(deployed: Deployed, space: Space) -> None:
    space.claim("data", CLASS)
    volume = space.bound("data")
    service = deployed.kubectl("get", "service", "nfs-provisioner", "-o=jsonpath={.spec.clusterIP}")
    assert volume.spec.nfs is not None
    assert volume.spec.nfs.server == service
    assert directories(deployed) == [volume.name]
    space.delete_claim("data")
    assert directories(deployed) == []


def test_pods_write_and_read_the_volume_over_kernel_mounts(
    deployed: Deployed, space: Space, kernel_node: str
) -> None:
    space.claim("data", CLASS)
    mounted = {"claims": {"/data": "data"}, "node": kernel_node}
    script = "grep ' /data nfs4 ' /proc/mounts && echo written > /data/file && sync"
    assert "nfs4" in space.run("writer", script, **mounted)
    assert space.run("reader", "cat /data/file", **mounted) == "written\n"
    volume = space.bound("data")
    served = ("exec", "deployment/nfs-provisioner", "--", "cat", f"/export/{volume.name}/file")
    assert deployed.kubectl(*served) == "written\n"
    space.delete_claim("data")
    assert directories(deployed) == []


def test_a_write_goes_on_when_the_pod_of_the_server_is_killed(
    deployed: Deployed, space: Space, kernel_node: str
) -> None:
    space.claim("data", CLASS)
    # Each line is on the server's disk before the next one is begun.
    write = "echo $number >> /data/file && sync /data/file || exit 1"
    script = f"for number in $(seq 1 40); do {write}; sleep 0.2; done"
    space.start("writer", script, claims={"/data": "data"}, node=kernel_node)
    volume = space.bound("data")
    path = f"/export/{volume.name}/file"
    cat = ("exec", "deployment/nfs-provisioner", "--", "sh", "-c", f"cat {path} || true")
    wait_until(lambda: len(deployed.kubectl(*cat).split()) >= 3, "the writer writes")
    deployed.kill()
    space.ended("writer")
    deployed.wait_ready()
    assert deployed.kubectl(*cat).split() == [str(number) for number in range(1, 41)]


def test_a_killed_pod_loses_no_claim(deployed: Deployed, space: Space) -> None:
    names = [f"data-{number}" for number in range(10)]
    for name in names:
        space.claim(name, CLASS)
    deployed.kill()
    volumes = sorted(space.bound(name).name for name in names)
    deployed.wait_ready()
    assert sorted(directories(deployed)) == volumes


def test_a_drained_node_loses_no_claim(deployed: Deployed, space: Space, site: Site) -> None:
    node = site.node_name
    space.claim("before", CLASS)
    space.bound("before")
    space.claim("during", CLASS)
    # Only the provisioner: on a cluster that was given, other pods are somebody's.
    selected = "--pod-selector=app.kubernetes.io/name=nfs-provisioner"
    drain = (selected, "--delete-emptydir-data", "--timeout=120s")
    site.kubectl("drain", node, *drain, limit_s=130)
    try:
        space.claim("after", CLASS)
    finally:
        site.kubectl("uncordon", node)
    volumes = sorted(space.bound(name).name for name in ("before", "during", "after"))
    deployed.wait_ready()
    assert sorted(directories(deployed)) == volumes
    for name in ("before", "during", "after"):
        space.delete_claim(name)
    wait_until(lambda: not directories(deployed), "no directory is left")
