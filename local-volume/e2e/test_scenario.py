"""local-volume-provisioner as an admin deploys it and users use it, on loop devices of a node."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import yaml

from external_storage import PersistentVolume
from external_storage.testing.cluster import Cluster
from external_storage.testing.cluster.deployed import Deployed, Site
from external_storage.testing.cluster.space import Space
from external_storage.testing.waiting import wait_until

DISKS, RAW = "local-disks", "local-raw"
IMAGES = "/mnt/local-volume-scenario"
MOUNT, LINK = f"/mnt/{DISKS}/scenario", f"/mnt/{RAW}/scenario"
ONCE = {"accessModes": ["ReadWriteOnce"]}
PATTERN = "precious data of the last user"


@pytest.fixture(scope="module")
def patches() -> Sequence[Mapping[str, Any]]:
    """As the README says for loop devices, which have no serial numbers."""
    classes = {
        DISKS: {"hostDir": f"/mnt/{DISKS}", "mountDir": f"/mnt/{DISKS}"},
        RAW: {
            "hostDir": f"/mnt/{RAW}",
            "mountDir": f"/mnt/{RAW}",
            "volumeMode": "Block",
            "cleanMethod": "zero",
            "identity": "placement",
        },
    }
    path = "/data/storageClassMap"
    change = [{"op": "replace", "path": path, "value": yaml.safe_dump(classes)}]
    return [{"target": {"kind": "ConfigMap"}, "patch": json.dumps(change)}]


class Admin:
    """Commands on the node, with its programs: what they mount is mounted there."""

    def __init__(self, site: Site) -> None:
        self.node = site.node_name
        self._space = Space.create(site, "local-volume-scenario-admin")

    def run(self, script: str) -> str:
        mount = {"name": "node", "mountPath": "/node", "mountPropagation": "Bidirectional"}
        return self._space.run(
            "admin",
            # Not "sh": that would be busybox again, with its own programs.
            f"PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot /node /bin/sh -c {shlex.quote(script)}",
            node=self.node,
            mounts=[mount],
            volumes=[{"name": "node", "hostPath": {"path": "/"}}],
            container={"securityContext": {"privileged": True}},
        )

    def close(self) -> None:
        self._space.delete()


@pytest.fixture(scope="module")
def admin(site: Site) -> Iterator[Admin]:
    made = Admin(site)
    try:
        made.run(f"mkdir -p {IMAGES} /mnt/{DISKS} /mnt/{RAW}")
        yield made
    finally:
        # All of it, whatever a test has left.
        made.run(
            f"umount {MOUNT}; rm -f {LINK}; rmdir {MOUNT}; for image in {IMAGES}/*.img; do "
            f"losetup -j $image | cut -d: -f1 | xargs -r losetup -d; done; rm -rf {IMAGES}; true"
        )
        made.close()


@pytest.fixture(scope="module")
def disk(deployed: Deployed, admin: Admin) -> PersistentVolume:
    """The volume of a file system that was mounted when the agent was running already."""
    image = f"{IMAGES}/disk.img"
    admin.run(
        f"truncate -s 64M {image} && mkfs.ext4 -q {image} && mkdir -p {MOUNT} && "
        f"mount -o loop {image} {MOUNT}"
    )
    return offered(deployed.site, DISKS)


@pytest.fixture(scope="module")
def raw(deployed: Deployed, admin: Admin) -> PersistentVolume:
    """The volume of a device that a link leads to."""
    image = f"{IMAGES}/raw.img"
    admin.run(f'truncate -s 64M {image} && ln -s "$(losetup --find --show {image})" {LINK}')
    return offered(deployed.site, RAW)


def offered(site: Site, storage_class: str, *, before: str = "") -> PersistentVolume:
    """Wait for the volume of a class to be free; ``before``: the UID of a former one."""

    def found() -> PersistentVolume | None:
        for volume in site.client.list_all(PersistentVolume):
            is_free = volume.status.phase == "Available" and volume.uid != before
            if volume.spec.storage_class_name == storage_class and is_free:
                return volume
        return None

    explain = lambda: site.kubectl("describe", "pv")  # noqa: E731
    made = wait_until(found, f"a volume of {storage_class} is offered", explain=explain)
    assert made is not None
    return made


def pod(claim: str) -> dict[str, Any]:
    """Of a pod that has a claim as the device /dev/raw."""
    return {
        "volumes": [{"name": "raw", "persistentVolumeClaim": {"claimName": claim}}],
        "container": {"volumeDevices": [{"name": "raw", "devicePath": "/dev/raw"}]},
    }


def test_a_mount_is_used_cleaned_and_offered_again(
    disk: PersistentVolume, space: Space, site: Site
) -> None:
    space.claim("data", DISKS, **ONCE)
    # The scheduler takes the pod to where the disk is.
    script = f"echo {PATTERN} > /data/file && sync && grep ' /data ' /proc/mounts"
    assert "ext" in space.run("writer", script, claims={"/data": "data"})
    bound = space.bound("data")
    assert (bound.name, bound.uid) == (disk.name, disk.uid)
    space.kubectl("delete", "pvc", "data")
    again = offered(site, DISKS, before=disk.uid)
    assert again.name == disk.name
    space.claim("next", DISKS, **ONCE)
    assert space.run("reader", "ls /data", claims={"/data": "next"}).split() == ["lost+found"]
    space.kubectl("delete", "pvc", "next")
    offered(site, DISKS, before=again.uid)


def test_a_raw_device_is_used_zeroed_and_offered_again(
    raw: PersistentVolume, space: Space, site: Site, admin: Admin
) -> None:
    space.claim("data", RAW, volumeMode="Block", **ONCE)
    script = f"echo {PATTERN} | dd of=/dev/raw bs=4k seek=1000 conv=fsync"
    space.run("writer", script, **pod("data"))
    read = f"dd if={IMAGES}/raw.img bs=4k skip=1000 count=1 2>/dev/null | tr -d '\\0'"
    assert PATTERN in admin.run(read)
    space.kubectl("delete", "pvc", "data")
    again = offered(site, RAW, before=raw.uid)
    assert again.name == raw.name
    assert admin.run(read) == ""


def test_nothing_that_is_used_is_wiped_whoever_is_killed(
    disk: PersistentVolume, space: Space, site: Site, deployed: Deployed
) -> None:
    space.claim("data", DISKS, **ONCE)
    hold = f"echo {PATTERN} > /data/file && sync && while [ ! -e /data/end ]; do sleep 0.2; done"
    space.start("holder", f"{hold}; cat /data/file", claims={"/data": "data"})
    space.running("holder")
    bound = space.bound("data")
    assert bound.name == disk.name
    # Its claim is gone for the API, but the pod is there: the volume is still in use.
    space.kubectl("delete", "pvc", "data", "--wait=false")
    for _ in range(2):
        deployed.kill()
        deployed.wait_ready()
    if isinstance(site, Cluster):
        site.kill_kubelet()
        deployed.kill()
        site.start_kubelet()
        deployed.wait_ready()
    assert space.kubectl("exec", "holder", "--", "cat", "/data/file") == f"{PATTERN}\n"
    space.kubectl("exec", "holder", "--", "touch", "/data/end")
    assert space.ended("holder") == f"{PATTERN}\n"
    space.kubectl("delete", "pod", "holder")
    again = offered(site, DISKS, before=bound.uid)
    assert again.name == disk.name
