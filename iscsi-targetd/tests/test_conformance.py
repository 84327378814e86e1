"""iscsi-targetd-provisioner keeps the promises that every provisioner makes, also when killed."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from tests.targetd_server import MIB, PASSWORD, USER, Model, TargetdServer

from external_storage.testing import Conformance, CrashSweep, Program, UnderTest

DEPLOY = Path(__file__).parents[1] / "deploy"


@pytest.fixture(autouse=True, scope="module")
def server() -> Iterator[None]:
    with TargetdServer(Model({})) as OverTargetd.server:
        yield


class OverTargetd(UnderTest):
    """How it is run, on a targetd with two pools of which the one with more space is taken."""

    manifests = (DEPLOY / "namespace.yaml", DEPLOY / "rbac.yaml")
    class_parameters = {
        "targetPortal": "10.0.0.5:3260",
        "initiators": "iqn.2026-01.com.example:one,iqn.2026-01.com.example:two",
        # Their claims are smaller than xfs can be.
        "fsType": "ext4",
    }
    bad_parameters = {
        "targetPortal": "10.0.0.5:0",
        "portals": "[fd00::5:3260",
        "iqn": "targetd",
        "initiators": "iqn.2026-01.com.example:one;two",
        "pool": "a/b/c",
        "thin": "maybe",
        "fsType": "../x",
        "chapAuthSession": "perhaps",
        "chapSecretName": "Secret!",
    }
    access_modes = ("ReadOnlyMany", "ReadWriteOnce", "ReadWriteOncePod")
    supports_block = True

    server: ClassVar[TargetdServer]

    def program(self, directory: Path) -> Program:
        self.server.model = Model(pools={"vg-targetd": 1024 * MIB, "fast/thin": 64 * MIB})
        (directory / "user").write_text(f"{USER}\n")
        (directory / "password").write_text(f"{PASSWORD}\n")
        config = {
            "type": "targetd",
            "url": self.server.url,
            "usernameFile": str(directory / "user"),
            "passwordFile": str(directory / "password"),
            "iqn": "iqn.2003-01.org.linux-iscsi.storage:targetd",
        }
        servers = directory / "servers.yaml"
        servers.write_text(json.dumps({"servers": {"storage": config}}))
        command = (sys.executable, "-m", "iscsi_targetd_provisioner")
        # Where the Role of the manifests holds.
        inside = {"POD_NAMESPACE": "iscsi-targetd-provisioner"}
        return Program(argv=(*command, f"--servers-file={servers}"), env=inside)

    def assets(self, directory: Path) -> Collection[str]:
        return [name for _, name in self.server.model.volumes]

    def traces(self, directory: Path) -> Collection[str]:
        return [f"export of {name}" for _, name in self.server.model.exports.values()]


class TestConformance(OverTargetd, Conformance):
    """What everybody promises."""


class TestCrashes(OverTargetd, CrashSweep):
    """Killed at each request to the API server. It changes no files."""

    test_killed_at_system_calls_of_a_provisioning = None  # type: ignore[assignment]
    test_killed_at_system_calls_of_a_deletion = None  # type: ignore[assignment]
