"""nfs-provisioner keeps the promises that every provisioner makes, also when it is killed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from external_storage.testing import Conformance, CrashSweep, Program, UnderTest
from external_storage.testing.processes import free_port
from nfs_provisioner.exportmgr import ExportError, ExportManager

DEPLOY = Path(__file__).parents[1] / "deploy"


# Below .state.
KEPT = ("volumes", "exports.d", "trash")


@pytest.mark.usefixtures("needs_ganesha")
class Nfs(UnderTest):
    """How nfs-provisioner is run."""

    manifests = (DEPLOY / "namespace.yaml", DEPLOY / "rbac.yaml")
    class_parameters = {"rootSquash": "true"}
    bad_parameters = {"gid": "0"}

    def program(self, directory: Path) -> Program:
        (directory / "export").mkdir()
        flags = (
            f"--export-root={directory / 'export'}",
            f"--run-dir={directory / 'run'}",
            "--server-hostname=127.0.0.1",
            "--bind-address=127.0.0.1",
            f"--nfs-port={free_port()}",
            "--grace-period=2",
            "--lease-lifetime=2",
        )
        return Program(argv=(sys.executable, "-m", "nfs_provisioner", *flags))

    def assets(self, directory: Path) -> Collection[str]:
        return [path.name for path in (directory / "export").iterdir() if path.name != ".state"]

    def traces(self, directory: Path) -> Collection[str]:
        """Records, export files, what waits in the trash, and what Ganesha serves if it runs."""
        state = directory / "export" / ".state"
        found = [path.name for place in KEPT for path in (state / place).glob("*")]
        manager = ExportManager(f"unix:path={directory / 'run' / 'bus'}")
        with contextlib.closing(manager), contextlib.suppress(ExportError):
            found += [path for path in manager.show().values() if path != "/"]
        return found


class TestConformance(Nfs, Conformance):
    """What everybody promises."""


class TestCrashes(Nfs, CrashSweep):
    """A sample of the steps, all with CRASH_SWEEP=full; ``provisioning`` kills at random ones."""
