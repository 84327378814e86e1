"""iscsi-targetd-provisioner as an admin deploys it and users use it: a storage host over SSH, whose
volumes the kubelet logs in to, formats and mounts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from external_storage import PersistentVolumeClaim, StorageClass
from external_storage.testing.access import ControlPlaneError
from external_storage.testing.cluster import layout
from external_storage.testing.cluster.deployed import Deployed, Site
from external_storage.testing.cluster.space import Space
from external_storage.testing.guest import Guest
from external_storage.testing.guest.storage import let_in, make_volume_group
from external_storage.testing.waiting import wait_until

NAME = "iscsi-targetd-provisioner"
CLASS, CHAP = "iscsi-targetd", "iscsi-targetd-chap"
GROUP = "vg-scenario"
POD = "/spec/template/spec"
MIB = 1 << 20
ONCE = {"accessModes": ["ReadWriteOnce"]}
PASSWORD = "the secret of the scenario"
PROGRAM = f"/opt/{NAME}/bin/{NAME}"


@pytest.fixture(scope="module")
def storage(
    request: pytest.FixtureRequest,
    joined_guest: Guest | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A directory with ``servers.yaml``, and the files that it names in /etc/storage1."""
    if joined_guest is not None:
        return make_storage_host(joined_guest, tmp_path_factory.mktemp("storage"))
    given: Path | None = request.config.getoption("--iscsi-storage")
    if given is None:
        pytest.skip("on an existing cluster it needs --iscsi-storage DIR")
    return given


def make_storage_host(guest: Guest, directory: Path) -> Path:
    """The guest is storage host too: a volume group with a thin pool, and a key that may log in."""
    let_in(guest, directory, host=layout.GUEST_ADDRESS)
    make_volume_group(guest, GROUP, size=1024 * MIB, thin_pool=768 * MIB)
    server = {
        "type": "lio-ssh",
        "ssh": {
            "host": layout.GUEST_ADDRESS,
            "knownHosts": "/etc/storage1/known_hosts",
            "keyFile": "/etc/storage1/ssh-key",
        },
        "iqn": "iqn.2026-01.com.example:scenario",
        "portals": [layout.GUEST_ADDRESS],
        "pools": [f"{GROUP}/thin"],
    }
    (directory / "servers.yaml").write_text(json.dumps({"servers": {"storage1": server}}))
    return directory


@pytest.fixture(scope="module")
def patches(storage: Path, site: Site) -> Sequence[Mapping[str, Any]]:
    """What the README asks an admin for: the hosts. And a node that is not an emulated one."""
    hosts = {"op": "replace", "path": "/data/servers.yaml"}
    hosts["value"] = (storage / "servers.yaml").read_text()
    node = {"op": "add", "path": f"{POD}/nodeSelector"}
    selector = {"value": {"kubernetes.io/hostname": site.node_name}}
    return [
        {"target": {"kind": "ConfigMap"}, "patch": json.dumps([hosts])},
        {"target": {"kind": "Deployment"}, "patch": json.dumps([{**node, **selector}])},
    ]


@pytest.fixture(scope="module")
def prepared(site: Site, storage: Path, request: pytest.FixtureRequest) -> None:
    """The README's steps before ``kubectl apply -k``, and those for CHAP."""
    manifests = request.path.parent.parent / "deploy"
    site.kubectl("apply", "-f", str(manifests / "namespace.yaml"))
    files = [f"--from-file={path}" for path in storage.iterdir() if path.name != "servers.yaml"]
    secret = ("-n", NAME, "create", "secret", "generic")
    site.kubectl(*secret, "storage1", *files)
    values = ("node.session.auth.username=scenario", f"node.session.auth.password={PASSWORD}")
    literals = [f"--from-literal={value}" for value in values]
    site.kubectl(*secret, "iscsi-chap", "--type=kubernetes.io/iscsi-chap", *literals)
    site.kubectl("apply", "-f", str(manifests / "chap.yaml"))


@pytest.fixture(scope="module")
def chap_class(deployed: Deployed) -> Iterator[str]:
    """The class of the manifests, but with CHAP, and with ext4 for a small volume."""
    client = deployed.site.client
    found = client.get(StorageClass, CLASS)
    chap = {"chapAuthSession": "true", "chapSecretName": "iscsi-chap", "fsType": "ext4"}
    made = {
        "metadata": {"name": CHAP},
        "provisioner": found.provisioner,
        "allowVolumeExpansion": True,
        "parameters": {**found.parameters, **chap},
    }
    created = client.create(StorageClass, made)
    yield CHAP
    client.delete(StorageClass, CHAP, uid=created.uid)


def left(deployed: Deployed) -> str:
    """What is on the hosts without a volume: nothing, unless something was forgotten."""
    command = (PROGRAM, "orphans", "--servers-file=/etc/iscsi-targetd/servers.yaml")
    name = ("--provisioner-name=iscsi-targetd",)
    try:
        deployed.kubectl("exec", f"deployment/{NAME}", "--", *command, *name)
    except ControlPlaneError as error:
        return str(error)
    return ""


def on_host(guest: Guest | None) -> list[str]:
    """What the host really has, where we can look: volumes, targets, and what is saved of them."""
    if guest is None:
        return []
    volumes = guest.run(["lvs", "--noheadings", "-o", "lv_name", GROUP]).split()
    targets = guest.run("ls /sys/kernel/config/target/iscsi").split()
    saved = guest.run("cat /etc/rtslib-fb-target/saveconfig.json")
    found = [name for name in volumes if name != "thin"]
    found += [name for name in targets if name.startswith("iqn.")]
    return found + ["saved" for word in ("iqn.", PASSWORD) if word in saved]


def requested(mib: int) -> dict[str, Any]:
    return {"resources": {"requests": {"storage": f"{mib}Mi"}}}


def secrets_told(deployed: Deployed, guest: Guest | None) -> list[str]:
    """Where the password can be read that should not show it."""
    found = [pod for pod in deployed.pods() if PASSWORD in deployed.kubectl("logs", pod)]
    if PASSWORD in deployed.site.kubectl("get", "events", "--all-namespaces", "-o", "json"):
        found.append("events")
    if guest is not None and PASSWORD in guest.run("cat /proc/[0-9]*/cmdline", check=False):
        found.append("arguments")
    return found


def test_a_pod_logs_in_and_sees_its_volumes_grow(
    deployed: Deployed,
    space: Space,
    kernel_node: str,
    chap_class: str,
    joined_guest: Guest | None,
) -> None:
    """One with CHAP and ext4, one of the class as it is in the manifests: xfs."""
    sizes = {"chap": (chap_class, 64, 128), "plain": (CLASS, 320, 400)}
    for name, (storage_class, size, _) in sizes.items():
        space.claim(name, storage_class, **ONCE, **requested(size))
    volumes = {name: space.bound(name) for name in sizes}
    source = volumes["chap"].spec.iscsi
    assert source is not None
    assert source.secret_ref["name"] == "iscsi-chap"
    hold = "echo precious | tee /chap/file > /plain/file && sync"
    wait = "while [ ! -e /chap/end ]; do sleep 0.2; done"
    show = "grep -E ' /(chap|plain) ' /proc/mounts && cat /chap/file /plain/file"
    mounted = {f"/{name}": name for name in sizes}
    space.start("holder", f"{hold}; {wait}; {show}", claims=mounted, node=kernel_node)
    space.running("holder")

    def in_use(name: str) -> int:
        blocks = space.kubectl("exec", "holder", "--", "stat", "-f", "-c", "%b %S", f"/{name}")
        count, each = blocks.split()
        return int(count) * int(each)

    for name, (_, before, after) in sizes.items():
        assert in_use(name) < before * MIB
        space.site.client.patch(
            PersistentVolumeClaim, name, {"spec": requested(after)}, namespace=space.name
        )
    for name, (_, before, after) in sizes.items():
        # The node-agent has grown the file system in use, and ended the claim's expansion.
        wait_until(
            lambda name=name, size=after * MIB: space.capacity(name) == size,  # type: ignore[misc]
            f"the claim {name} has grown",
            limit_s=300,
            explain=lambda name=name: space.kubectl("describe", "pvc", name),  # type: ignore[misc]
        )
        assert in_use(name) > before * MIB
    space.kubectl("exec", "holder", "--", "touch", "/chap/end")
    printed = space.ended("holder")
    assert " ext4 " in printed
    assert " xfs " in printed
    assert printed.count("precious") == 2
    assert secrets_told(deployed, joined_guest) == []
    space.kubectl("delete", "pod", "holder")
    for name in sizes:
        space.delete_claim(name)
    assert left(deployed) == ""
    assert on_host(joined_guest) == []


def test_a_raw_device_is_written_by_one_pod_and_read_by_the_next(
    deployed: Deployed, space: Space, kernel_node: str, joined_guest: Guest | None
) -> None:
    space.claim("raw", CLASS, volumeMode="Block", **ONCE, **requested(16))
    space.bound("raw")
    pod = {
        "node": kernel_node,
        "volumes": [{"name": "raw", "persistentVolumeClaim": {"claimName": "raw"}}],
        "container": {"volumeDevices": [{"name": "raw", "devicePath": "/dev/raw"}]},
    }
    space.run("writer", "echo precious | dd of=/dev/raw bs=4k seek=1000 conv=fsync", **pod)
    read = "dd if=/dev/raw bs=4k skip=1000 count=1 2>/dev/null | tr -d '\\0'"
    assert space.run("reader", read, **pod) == "precious\n"
    space.delete_claim("raw")
    assert left(deployed) == ""
    assert on_host(joined_guest) == []


def test_killed_pods_lose_no_claim(
    deployed: Deployed, space: Space, chap_class: str, joined_guest: Guest | None
) -> None:
    names = [f"data-{number}" for number in range(5)]
    for name in names:
        space.claim(name, chap_class, **ONCE, **requested(8))
    deployed.kill()
    volumes = {space.bound(name).name for name in names}
    deployed.wait_ready()
    assert len(volumes) == len(names)
    assert left(deployed) == ""
    if joined_guest is not None:
        assert volumes == {name for name in on_host(joined_guest) if name.startswith("pvc-")}
    for name in names:
        space.kubectl("delete", "pvc", name, "--wait=false")
    deployed.kill()
    deployed.wait_ready()
    gone = ("get", "pv", "-o", "name")
    wait_until(
        lambda: not volumes & {line.partition("/")[2] for line in space.kubectl(*gone).split()},
        "every volume is gone",
    )
    assert left(deployed) == ""
    assert on_host(joined_guest) == []
