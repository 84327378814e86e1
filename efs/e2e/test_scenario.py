"""efs-provisioner as an admin deploys it and users use it, for directories: an NFS server in the
place of EFS, which makes no call of AWS necessary."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from external_storage.testing.cluster.deployed import Deployed
from external_storage.testing.cluster.e2e import NfsExport
from external_storage.testing.cluster.space import Space
from external_storage.testing.waiting import wait_until

SHARE = "/persistentvolumes"
CLASS, RETAINING = "efs", "efs-retain"
POD = "/spec/template/spec"
CONTAINER = f"{POD}/containers/0"
PROGRAM = "/opt/efs-provisioner/bin/efs-provisioner"
EXEC = ("exec", "deployment/efs-provisioner", "--")


@pytest.fixture(scope="module")
def patches(nfs_export: NfsExport, kernel_node: str) -> Sequence[Mapping[str, Any]]:
    """The server in EFS's place, on a node that can mount it, which may be an emulated one: what it
    does takes its time, so there is one replica, and probes wait for it."""
    added = {
        f"{CONTAINER}/env/-": {"name": "DNS_NAME", "value": nfs_export.server},
        f"{POD}/volumes/0/nfs": {"server": nfs_export.server, "path": nfs_export.path},
        f"{POD}/nodeSelector": {"kubernetes.io/hostname": kernel_node},
    }
    replaced: dict[str, object] = {
        f"{CONTAINER}/{probe}/timeoutSeconds": 20
        for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    replaced |= {"/spec/replicas": 1, f"{CONTAINER}/startupProbe/failureThreshold": 300}
    changes: list[dict[str, Any]] = [
        {"op": op, "path": path, "value": value}
        for op, values in (("add", added), ("replace", replaced))
        for path, value in values.items()
    ]
    # The doctor looks for credentials: here there are none, and nobody to ask.
    alone = {"name": "AWS_EC2_METADATA_DISABLED", "value": "true"}
    changes.append({"op": "add", "path": f"{CONTAINER}/env/-", "value": alone})
    slow = ("--leader-elect-lease-duration=30s", "--leader-elect-renew-deadline=20s")
    for flag in (*slow, "--call-timeout=100s"):
        changes.append({"op": "add", "path": f"{CONTAINER}/args/-", "value": flag})
    return [{"target": {"kind": "Deployment"}, "patch": json.dumps(changes)}]


@pytest.fixture(scope="module")
def rollout_limit_s() -> float:
    return 600.0


@pytest.fixture(scope="module")
def retaining(deployed: Deployed) -> Iterator[str]:
    """The class of the manifests, but with ``onDelete: retain``."""
    found = json.loads(deployed.site.kubectl("get", "storageclass", CLASS, "-o", "json"))
    parameters = {**found["parameters"], "onDelete": "retain"}
    made = {**found, "metadata": {"name": RETAINING}, "parameters": parameters}
    deployed.site.kubectl("create", "-f", "-", input=json.dumps(made))
    yield RETAINING
    deployed.site.kubectl("delete", "storageclass", RETAINING)


def directories(deployed: Deployed) -> list[str]:
    """What is on the file system, beside what is the provisioner's own."""
    return deployed.kubectl(*EXEC, "ls", SHARE).split()


def test_pods_write_and_read_the_volume_over_kernel_mounts(
    deployed: Deployed, space: Space, kernel_node: str, nfs_export: NfsExport
) -> None:
    space.claim("data", CLASS)
    volume = space.bound("data")
    assert volume.spec.nfs is not None
    assert volume.spec.nfs.server == nfs_export.server
    (name,) = directories(deployed)
    assert volume.spec.nfs.path == f"{nfs_export.path}/{name}"
    # Not root: the volume's group lets it write.
    somebody = {"runAsUser": 1234, "runAsNonRoot": True}
    mounted = {"claims": {"/data": "data"}, "node": kernel_node, "securityContext": somebody}
    script = "grep ' /data nfs4 ' /proc/mounts && echo written > /data/file && sync"
    assert "vers=4.1" in space.run("writer", script, **mounted)
    assert space.run("reader", "cat /data/file", **mounted) == "written\n"
    space.delete_claim("data")
    assert directories(deployed) == []


def test_retained_data_outlives_its_volume(
    deployed: Deployed, space: Space, retaining: str
) -> None:
    space.claim("data", retaining)
    space.bound("data")
    (name,) = directories(deployed)
    deployed.kubectl(*EXEC, "sh", "-c", f"echo kept > {SHARE}/{name}/file")
    space.delete_claim("data")
    assert directories(deployed) == [name]
    assert deployed.kubectl(*EXEC, "cat", f"{SHARE}/{name}/file") == "kept\n"
    deployed.kubectl(*EXEC, "rm", "-r", f"{SHARE}/{name}")


def test_killed_pods_lose_no_claim(deployed: Deployed, space: Space) -> None:
    names = [f"data-{number}" for number in range(5)]
    for name in names:
        space.claim(name, CLASS)
    deployed.kill()
    paths = {volume.spec.nfs.path for volume in map(space.bound, names) if volume.spec.nfs}
    deployed.wait_ready()
    assert {path.rpartition("/")[2] for path in paths} == set(directories(deployed))
    assert len(paths) == len(names)
    for name in names:
        space.kubectl("delete", "pvc", name, "--wait=false")
    deployed.kill()
    deployed.wait_ready()
    wait_until(lambda: not directories(deployed), "every directory is gone")


def test_the_doctor_is_run_where_the_provisioner_is(
    deployed: Deployed, nfs_export: NfsExport
) -> None:
    """As the README says; without AWS it has something to say of that."""
    told = deployed.kubectl(*EXEC, "sh", "-c", f"{PROGRAM} doctor || true", limit_s=400)
    (mount,) = (line for line in told.splitlines() if ": mount" in line)
    assert mount.startswith("ok")
    assert f"{nfs_export.server}:{nfs_export.path} at {SHARE}" in mount
    (identity,) = (line for line in told.splitlines() if "AWS identity" in line)
    assert identity.startswith("FAILED")
    assert "no AWS credentials" in identity
