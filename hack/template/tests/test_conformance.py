"""What every provisioner promises, tested on this one."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

from external_storage.testing.conformance import Conformance
from external_storage.testing.program import Program

DEPLOY = Path(__file__).parents[1] / "deploy"


class TestConformance(Conformance):
    """Runs the program under the ServiceAccount of the manifests, on a directory of the test's."""

    manifests = (DEPLOY / "namespace.yaml", DEPLOY / "rbac.yaml")
    bad_parameters = {"gid": "staff"}

    def program(self, directory: Path) -> Program:
        command = (sys.executable, "-m", "new_store_provisioner")
        return Program(argv=(*command, f"--volume-root={directory}"))

    # REPLACE: ask your back end what there is.
    def assets(self, directory: Path) -> Collection[str]:
        return [path.name for path in directory.iterdir() if path.name != ".state"]

    def traces(self, directory: Path) -> Collection[str]:
        return [path.name for path in (directory / ".state" / "volumes").glob("*")]
