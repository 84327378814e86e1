"""efs-provisioner as an admin deploys it and users use it, for directories: an NFS server in the
place of EFS, which makes no call of AWS necessary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from external_storage.testing.cluster.deployed import Deployed
from external_storage.testing.cluster.e2e import NfsExport
from external_storage.testing.cluster.space import Space
from external_storage.testing.waiting import wait_until

SHARE = "/persistentvolumes"
CLASS = "efs"
POD = "/spec/template/spec"


@pytest.fixture(scope="module")
def patches(nfs_export: NfsExport, kernel_node: str) -> Sequence[Mapping[str, Any]]:
    """The server in EFS's place, on a node that can mount it, which may be an emulated one: what it
    does takes its time."""
    values = {
        f"{POD}/containers/0/env/-": {"name": "DNS_NAME", "value": nfs_export.server},
        f"{POD}/volumes/0/nfs": {"server": nfs_export.server, "path": nfs_export.path},
        f"{POD}/nodeSelector": {"kubernetes.io/hostname": kernel_node},
    }
    changes = [{"op": "add", "path": path, "value": value} for path, value in values.items()]
    for lease in ("--leader-elect-lease-duration=30s", "--leader-elect-renew-deadline=20s"):
        changes.append({"op": "add", "path": f"{POD}/containers/0/args/-", "value": lease})
    return [{"target": {"kind": "Deployment"}, "patch": json.dumps(changes)}]


def directories(deployed: Deployed) -> list[str]:
    """What is on the file system, beside what is the provisioner's own."""
    listed = deployed.kubectl("exec", "deployment/efs-provisioner", "--", "ls", SHARE)
    return listed.split()


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
