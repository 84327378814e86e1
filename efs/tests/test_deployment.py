"""The manifests: accepted by a real API server, whole, and not more than is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from external_storage.testing import ControlPlane

DEPLOY = Path(__file__).parents[1] / "deploy"


def test_the_api_server_accepts_the_manifests_and_the_examples(control_plane: ControlPlane) -> None:
    control_plane.kubectl("apply", "-f", str(DEPLOY / "namespace.yaml"))
    control_plane.kubectl("apply", "--dry-run=server", "-k", str(DEPLOY))
    for example in (DEPLOY / "examples").iterdir():
        control_plane.kubectl("apply", "--dry-run=server", "-f", str(example))


def test_the_volume_of_the_pod_is_the_file_system_of_its_settings() -> None:
    manifest = yaml.safe_load((DEPLOY / "deployment.yaml").read_text())
    pod: dict[str, Any] = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (volume,) = pod["volumes"]
    said = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    server = f"{said['FILE_SYSTEM_ID']}.efs.{said['AWS_REGION']}.amazonaws.com"
    assert volume["nfs"] == {"server": server, "path": "/"}
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"]]
