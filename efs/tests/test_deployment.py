"""The manifests: accepted by a real API server, whole, and not more than is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from external_storage import PersistentVolumeClaim
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.names import ANN_SELECTED_NODE
from external_storage.kube.types import Node
from external_storage.testing import ControlPlane, Sandbox

if TYPE_CHECKING:
    from tests.faulty_efs import FaultyEfs

DEPLOY = Path(__file__).parents[1] / "deploy"
NAME = "efs-provisioner"
Right = tuple[str, str, str, str]
"""API group, resource, verb, and the name of the object if that counts."""


def container() -> dict[str, Any]:
    manifest = yaml.safe_load((DEPLOY / "deployment.yaml").read_text())
    (found,) = manifest["spec"]["template"]["spec"]["containers"]
    return dict(found)


def settings() -> dict[str, str]:
    """The environment in the manifest, as far as it says values."""
    return {entry["name"]: entry["value"] for entry in container()["env"] if "value" in entry}


def test_the_api_server_accepts_the_manifests_and_the_examples(control_plane: ControlPlane) -> None:
    control_plane.kubectl("apply", "-f", str(DEPLOY / "namespace.yaml"))
    control_plane.kubectl("apply", "--dry-run=server", "-k", str(DEPLOY))
    for example in (DEPLOY / "examples").iterdir():
        control_plane.kubectl("apply", "--dry-run=server", "-f", str(example))


def test_the_volume_of_the_pod_is_the_file_system_of_its_settings() -> None:
    manifest = yaml.safe_load((DEPLOY / "deployment.yaml").read_text())
    (volume,) = manifest["spec"]["template"]["spec"]["volumes"]
    said = settings()
    server = f"{said['FILE_SYSTEM_ID']}.efs.{said['AWS_REGION']}.amazonaws.com"
    assert volume["nfs"] == {"server": server, "path": "/"}
    assert [mount["name"] for mount in container()["volumeMounts"]] == [volume["name"]]


def test_the_classes_are_those_of_the_deployments_provisioner_name() -> None:
    classes = list(yaml.safe_load_all((DEPLOY / "class.yaml").read_text()))
    assert {found["provisioner"] for found in classes} == {settings()["PROVISIONER_NAME"]}


# -- rights


@pytest.fixture
def deployed(
    control_plane: ControlPlane, efs: FaultyEfs, namespace: str, tmp_path: Path
) -> Iterator[str]:
    """The program with the manifest's arguments, environment and ServiceAccount; the provisioner
    name."""
    for file in ("namespace.yaml", "rbac.yaml"):
        control_plane.kubectl("apply", "-f", str(DEPLOY / file))
    account = control_plane.service_account_kubeconfig(NAME, NAME)
    name = f"example.com/{namespace}"
    given = {
        **settings(),
        **efs.environment,
        "FILE_SYSTEM_ID": efs.make_file_system(),
        "PROVISIONER_NAME": name,
        "POD_NAMESPACE": NAME,
    }
    # Given twice, the last one counts.
    flags = (f"--kubeconfig={account}", "--http-endpoint=", "--retry-interval-max=1s")
    command = [sys.executable, "-m", "efs_provisioner", *container()["args"], *flags]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **given}
        )
    try:
        yield name
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        sys.stderr.write(log.read_text(errors="replace"))


@pytest.fixture
def client(control_plane: ControlPlane) -> Iterator[Client]:
    made = Client(auth.load(kubeconfig=str(control_plane.kubeconfig)))
    yield made
    made.close()


@pytest.fixture
def used(control_plane: ControlPlane) -> Any:
    """What the audit log has of our ServiceAccount, from now on. The key of notes is made anew."""
    secret = ("secret", "external-storage-intents", f"--namespace={NAME}")
    control_plane.kubectl("delete", *secret, "--ignore-not-found")
    before = len(control_plane.audit_events())

    def look() -> list[dict[str, Any]]:
        user = f"system:serviceaccount:{NAME}:{NAME}"
        events = control_plane.audit_events()[before:]
        return [event for event in events if event["user"]["username"] == user]

    return look


def rights() -> set[Right]:
    found: set[Right] = set()
    for manifest in yaml.safe_load_all((DEPLOY / "rbac.yaml").read_text()):
        for rule in manifest.get("rules", ()):
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    for verb in rule["verbs"]:
                        for name in rule.get("resourceNames", [""]):
                            found.add((group, resource, verb, name))
    return found


def test_the_rights_are_exactly_those_that_are_used(
    control_plane: ControlPlane,
    client: Client,
    efs: FaultyEfs,
    used: Any,
    deployed: str,
    namespace: str,
) -> None:
    users = Sandbox(api=client, namespace=namespace, provisioner=deployed)
    node = client.create(Node, {"metadata": {"name": f"node-{namespace}"}})
    try:
        efs.denied.add("CreateAccessPoint")
        parameters = {"provisioningMode": "efs-ap"}
        users.claim("data", users.storage_class("-now", parameters=parameters))
        # Told several times, it becomes one event that is changed.
        users.wait(
            lambda: any(event.count > 1 for event in users.events("data", "ProvisioningFailed")),
            "an event is repeated",
        )
        efs.clear_faults()
        later = users.storage_class(
            "-later", parameters=parameters, volumeBindingMode="WaitForFirstConsumer"
        )
        users.claim("scheduled", later)
        selected = {"metadata": {"annotations": {ANN_SELECTED_NODE: node.name}}}
        client.patch(PersistentVolumeClaim, "scheduled", selected, namespace=namespace)
        users.wait_bound("data", "scheduled")
        users.delete_claims()
        users.wait(lambda: not users.volumes(), "all volumes are gone")
        renewal = ("leases", "patch")
        users.wait(
            lambda: renewal in {(e["objectRef"]["resource"], e["verb"]) for e in used()},
            "the lease is renewed",
        )
    finally:
        client.delete(Node, node.name, uid=node.uid)
        users.clean_up()
    named = {right[:3]: right[3] for right in rights() if right[3]}
    asked: set[Right] = set()
    for event in used():
        about = event["objectRef"]
        right = (about.get("apiGroup", ""), about["resource"], event["verb"])
        asked.add((*right, about.get("name", "") if right in named else ""))
        assert event["responseStatus"]["code"] != 403, json.dumps(event)
    assert asked == rights()
