"""The manifests on a real control plane, and the program with the rights that they give it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from external_storage.testing import ControlPlane

DEPLOY = Path(__file__).parents[1] / "deploy"
NAME = "nfs-client-provisioner"
LIMIT_S = 60.0


def applied(plane: ControlPlane, *names: str, dry_run: bool = False) -> None:
    for name in names:
        dry = ("--dry-run=server",) if dry_run else ()
        plane.kubectl("apply", *dry, "-f", str(DEPLOY / name))


@pytest.fixture(scope="module")
def plane(control_plane: ControlPlane) -> ControlPlane:
    """With the namespace of the manifests."""
    applied(control_plane, "namespace.yaml")
    return control_plane


def wait_for(plane: ControlPlane, condition: str, *what: str) -> None:
    limit = f"--timeout={LIMIT_S:g}s"
    plane.kubectl("wait", f"--for={condition}", *what, limit, limit_s=2 * LIMIT_S)


def deployed() -> dict[str, Any]:
    """The pod of the Deployment."""
    manifest = yaml.safe_load((DEPLOY / "deployment.yaml").read_text())
    pod: dict[str, Any] = manifest["spec"]["template"]["spec"]
    return pod


@contextlib.contextmanager
def running(kubeconfig: Path, share: Path, entry: dict[str, Any], log: Path) -> Iterator[None]:
    """The program with the manifest's arguments, capabilities and ServiceAccount."""
    (container,) = deployed()["containers"]
    file = share.with_name("servers.yaml")
    file.write_text(yaml.safe_dump({"servers": {"one": entry}}))
    command = [sys.executable, "-m", "nfs_client_provisioner", *container["args"]]
    # Given twice, the last one counts.
    command += [f"--kubeconfig={kubeconfig}", f"--servers={file}", "--http-endpoint="]
    if os.geteuid() == 0:
        capabilities = container["securityContext"]["capabilities"]
        assert capabilities["drop"] == ["ALL"]
        kept = ",".join(f"+{name.lower()}" for name in capabilities["add"])
        command = ["setpriv", f"--bounding-set=-all,{kept}", *command]
    environment = {"POD_NAMESPACE": NAME, "PROVISIONER_NAME": environment_of(container)["name"]}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **environment}
        )
    try:
        yield
        process.terminate()
        assert process.wait(LIMIT_S) == 0
    finally:
        process.kill()
        process.wait()
        sys.stderr.write(log.read_text(errors="replace"))


def environment_of(container: dict[str, Any]) -> dict[str, str]:
    found = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    return {
        "name": found["PROVISIONER_NAME"],
        "server": found["NFS_SERVER"],
        "path": found["NFS_PATH"],
    }


def test_manifests_are_accepted_by_the_api_server(plane: ControlPlane) -> None:
    """Also where nfs-subdir is installed: its class, as its own manifests have it, stays."""
    old = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": "nfs-client"},
        "provisioner": "k8s-sigs.io/nfs-subdir-external-provisioner",
        "parameters": {"archiveOnDelete": "false"},
    }
    plane.kubectl("create", "-f", "-", input=json.dumps(old))
    plane.kubectl("apply", "--dry-run=server", "-k", str(DEPLOY))
    examples = [f"examples/{path.name}" for path in (DEPLOY / "examples").iterdir()]
    applied(plane, *examples, dry_run=True)


def test_the_share_that_is_mounted_is_the_one_that_is_put_into_volumes() -> None:
    pod = deployed()
    (container,) = pod["containers"]
    (volume,) = pod["volumes"]
    said = environment_of(container)
    assert volume["nfs"] == {"server": said["server"], "path": said["path"]}
    assert container["volumeMounts"] == [
        {"name": volume["name"], "mountPath": "/persistentvolumes"}
    ]


def test_a_claim_becomes_a_directory_and_goes_again(
    plane: ControlPlane, namespace: str, share: Path, share_entry: Any, tmp_path: Path
) -> None:
    """Of a group and an owner that are not ours, with somebody else's closed directory in it."""
    applied(plane, "rbac.yaml", "class.yaml")
    account = plane.service_account_kubeconfig(NAME, NAME)
    inside = ("--namespace", namespace)
    claim = ("pvc/nfs-client-example", *inside)
    with running(account, share, share_entry(share), tmp_path / "log"):
        plane.kubectl("apply", "-f", str(DEPLOY / "examples" / "claim.yaml"), *inside)
        wait_for(plane, "jsonpath={.status.phase}=Bound", *claim)
        volume = plane.kubectl("get", *claim, "--output=jsonpath={.spec.volumeName}")
        directory = share / f"{namespace}-nfs-client-example-{volume}"
        assert directory.stat().st_gid >= 2000
        closed = directory / "closed"
        closed.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(closed, 12345, 12345)
            os.chown(directory, 12345, directory.stat().st_gid)
        plane.kubectl("delete", *claim, "--wait=false")
        wait_for(plane, "delete", f"pv/{volume}")
    (archive,) = (path.name for path in share.iterdir() if path.name[0] != ".")
    assert archive.startswith(f"archived-{namespace}-nfs-client-example-{volume}")
