"""The manifests on a real control plane, and the program with the rights that they give it."""

from __future__ import annotations

import contextlib
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
NAME = "new-store-provisioner"
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


def deployed_container() -> dict[str, Any]:
    manifest = yaml.safe_load((DEPLOY / "deployment.yaml").read_text())
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = container
    return found


@contextlib.contextmanager
def running(kubeconfig: Path, root: Path, log: Path) -> Iterator[None]:
    """The program with the manifest's arguments, capabilities and ServiceAccount."""
    container = deployed_container()
    command = [sys.executable, "-m", "new_store_provisioner", *container["args"]]
    # Given twice, the last one counts.
    command += [f"--kubeconfig={kubeconfig}", f"--volume-root={root}", "--http-endpoint="]
    if os.geteuid() == 0:
        capabilities = container["securityContext"]["capabilities"]
        assert capabilities["drop"] == ["ALL"]
        kept = ",".join(f"+{name.lower()}" for name in capabilities["add"])
        command = ["setpriv", f"--bounding-set=-all,{kept}", *command]
    environment = {**os.environ, "POD_NAMESPACE": NAME}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        yield
        process.terminate()
        assert process.wait(LIMIT_S) == 0
    finally:
        process.kill()
        process.wait()
        sys.stderr.write(log.read_text(errors="replace"))


def test_manifests_are_accepted_by_the_api_server(plane: ControlPlane) -> None:
    plane.kubectl("apply", "--dry-run=server", "-k", str(DEPLOY))
    applied(plane, "examples/claim.yaml", "examples/pod.yaml", dry_run=True)


def test_a_claim_becomes_a_directory_and_goes_again(
    plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    applied(plane, "rbac.yaml", "class.yaml")
    account = plane.service_account_kubeconfig(NAME, NAME)
    root = tmp_path / "volumes"
    root.mkdir()
    inside = ("--namespace", namespace)
    claim = ("pvc/new-store-example", *inside)
    with running(account, root, tmp_path / "log"):
        plane.kubectl("apply", "-f", str(DEPLOY / "examples" / "claim.yaml"), *inside)
        wait_for(plane, "jsonpath={.status.phase}=Bound", *claim)
        volume = plane.kubectl("get", *claim, "--output=jsonpath={.spec.volumeName}")
        assert (root / volume).is_dir()
        plane.kubectl("delete", *claim, "--wait=false")
        wait_for(plane, "delete", f"pv/{volume}")
        assert [path.name for path in root.iterdir()] == [".state"]
