"""nfs-client-provisioner as an admin deploys it and users use it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from external_storage.testing.cluster.deployed import Deployed, Site
from external_storage.testing.cluster.e2e import NfsExport
from external_storage.testing.cluster.space import Space
from external_storage.testing.waiting import wait_until

SHARE = "/persistentvolumes"
ARCHIVING, REMOVING = "nfs-directory", "nfs-directory-delete"
POD = "/spec/template/spec"


@pytest.fixture(scope="module")
def patches(nfs_export: NfsExport, kernel_node: str) -> Sequence[Mapping[str, Any]]:
    """What the README asks an admin for: the server, in both places. And a node that can mount,
    which may be an emulated one: what it does takes its time."""
    values = {
        f"{POD}/containers/0/env/1/value": nfs_export.server,
        f"{POD}/containers/0/env/2/value": nfs_export.path,
        f"{POD}/volumes/0/nfs": {"server": nfs_export.server, "path": nfs_export.path},
        f"{POD}/nodeSelector": {"kubernetes.io/hostname": kernel_node},
    }
    changes = [{"op": "add", "path": path, "value": value} for path, value in values.items()]
    for lease in ("--leader-elect-lease-duration=30s", "--leader-elect-renew-deadline=20s"):
        changes.append({"op": "add", "path": f"{POD}/containers/0/args/-", "value": lease})
    return [{"target": {"kind": "Deployment"}, "patch": json.dumps(changes)}]


@pytest.fixture(scope="module")
def removing(deployed: Deployed) -> Iterator[str]:
    """The class of the manifests, but with ``onDelete: delete``."""
    found = json.loads(deployed.site.kubectl("get", "storageclass", ARCHIVING, "-o", "json"))
    parameters = {**found["parameters"], "onDelete": "delete"}
    made = {**found, "metadata": {"name": REMOVING}, "parameters": parameters}
    deployed.site.kubectl("create", "-f", "-", input=json.dumps(made))
    yield REMOVING
    deployed.site.kubectl("delete", "storageclass", REMOVING)


def on_share(deployed: Deployed, script: str) -> str:
    """What a command prints in the share's directory, as the provisioner sees it."""
    shell = ("sh", "-c", f"cd {SHARE} && {script}")
    return deployed.kubectl("exec", "deployment/nfs-client-provisioner", "--", *shell)


def directories(deployed: Deployed) -> list[str]:
    """What is right below the server's path, beside what is the provisioner's own."""
    return on_share(deployed, "ls").split()


def test_pods_write_and_read_the_volume_over_kernel_mounts(
    deployed: Deployed, space: Space, kernel_node: str, nfs_export: NfsExport, removing: str
) -> None:
    space.claim("data", removing)
    volume = space.bound("data")
    assert volume.spec.nfs is not None
    assert volume.spec.nfs.server == nfs_export.server
    name = f"{space.name}-data-{volume.name}"
    assert volume.spec.nfs.path == f"{nfs_export.path}/{name}"
    # Not root: the volume's group lets it write.
    somebody = {"runAsUser": 1234, "runAsNonRoot": True}
    mounted = {"claims": {"/data": "data"}, "node": kernel_node, "securityContext": somebody}
    script = "grep ' /data nfs4 ' /proc/mounts && echo written > /data/file && sync"
    assert "nfs4" in space.run("writer", script, **mounted)
    assert space.run("reader", "cat /data/file", **mounted) == "written\n"
    assert on_share(deployed, f"cat {name}/file") == "written\n"
    space.delete_claim("data")
    assert directories(deployed) == []
    trash = "ls .external-storage/trash .external-storage/records | grep -v :"
    wait_until(lambda: not on_share(deployed, f"{trash} || true").split(), "nothing is left")


def test_the_class_of_the_manifests_archives(deployed: Deployed, space: Space) -> None:
    space.claim("data", ARCHIVING)
    volume = space.bound("data")
    name = f"{space.name}-data-{volume.name}"
    on_share(deployed, f"echo kept > {name}/file")
    space.delete_claim("data")
    (archived,) = directories(deployed)
    assert archived.startswith(f"archived-{name}")
    assert on_share(deployed, f"cat {archived}/file") == "kept\n"
    on_share(deployed, f"rm -r {archived}")


def test_a_killed_pod_loses_no_claim(deployed: Deployed, space: Space, removing: str) -> None:
    names = [f"data-{number}" for number in range(10)]
    for name in names:
        space.claim(name, removing)
    deployed.kill()
    expected = {f"{space.name}-{name}-{space.bound(name).name}" for name in names}
    deployed.wait_ready()
    assert set(directories(deployed)) == expected
    for name in names:
        space.kubectl("delete", "pvc", name, "--wait=false")
    deployed.kill()
    deployed.wait_ready()
    wait_until(lambda: not directories(deployed), "every directory is gone")


def test_a_drained_node_loses_no_claim(
    deployed: Deployed, space: Space, site: Site, kernel_node: str, removing: str
) -> None:
    space.claim("before", removing)
    space.bound("before")
    space.claim("during", removing)
    # Only the provisioner: on a cluster that was given, other pods are somebody's.
    selected = "--pod-selector=app.kubernetes.io/name=nfs-client-provisioner"
    drain = (selected, "--delete-emptydir-data", "--timeout=120s")
    site.kubectl("drain", kernel_node, *drain, limit_s=130)
    try:
        space.claim("after", removing)
    finally:
        site.kubectl("uncordon", kernel_node)
    names = ("before", "during", "after")
    expected = {f"{space.name}-{name}-{space.bound(name).name}" for name in names}
    deployed.wait_ready()
    assert set(directories(deployed)) == expected
    for name in names:
        space.delete_claim(name)
    assert directories(deployed) == []
