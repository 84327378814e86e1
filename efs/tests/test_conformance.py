"""efs-provisioner keeps the promises that every provisioner makes, in both modes, also when it is
killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

from external_storage.testing import Conformance, CrashSweep, Program, UnderTest

if TYPE_CHECKING:
    from tests.faulty_efs import FaultyEfs

DEPLOY = Path(__file__).parents[1] / "deploy"
# Where the manifests let it keep the key of its notes on claims.
IN_POD = {"POD_NAMESPACE": "efs-provisioner"}
MANIFESTS = (DEPLOY / "namespace.yaml", DEPLOY / "rbac.yaml")


class AccessPoints(UnderTest):
    """How it is run for access points."""

    manifests = MANIFESTS
    class_parameters = {"provisioningMode": "efs-ap", "basePath": "/volumes"}
    # All that the driver's node plugin mounts.
    access_modes = ("ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod")
    bad_parameters = {"directoryPerms": "rwx", "gidMin": "3000", "fileSystemId": "data"}
    efs: ClassVar[FaultyEfs]
    file_system: ClassVar[str]

    @pytest.fixture(autouse=True)
    def _aws(self, _efs_server: FaultyEfs) -> None:
        type(self).efs = _efs_server

    def program(self, directory: Path) -> Program:
        type(self).file_system = self.efs.make_file_system()
        command = (sys.executable, "-m", "efs_provisioner", f"--file-system-id={self.file_system}")
        return Program(argv=command, env={**IN_POD, **self.efs.environment})

    def assets(self, directory: Path) -> Collection[str]:
        return [point["AccessPointId"] for point in self.efs.access_points(self.file_system)]


class TestAccessPoints(AccessPoints, Conformance):
    """What everybody promises."""


class TestAccessPointCrashes(AccessPoints, CrashSweep):
    """Killed at every request of the API server. Its own process changes no files."""

    test_killed_at_system_calls_of_a_provisioning = None  # type: ignore[assignment]
    test_killed_at_system_calls_of_a_deletion = None  # type: ignore[assignment]


class Directories(UnderTest):
    """How it is run for directories: on a tmpfs that says to be the file system."""

    manifests = MANIFESTS
    bad_parameters = {"gidMin": "1", "gidRangeStart": "50000", "subPathPattern": "../x"}
    file_system: ClassVar[str] = "fs-0123456789abcdef0"
    mounted: ClassVar[list[Path]] = []

    @pytest.fixture(autouse=True)
    def _unmount(self, request: pytest.FixtureRequest) -> None:
        """At the end of the class, or of its directory: of all that ``program`` has mounted."""
        node = request.node.getparent(pytest.Class)
        if not self.mounted:
            node.addfinalizer(self._unmount_all)

    def _unmount_all(self) -> None:
        while self.mounted:
            # Lazily: a worker that is being killed may still be in it.
            subprocess.run(["umount", "--lazy", str(self.mounted.pop())], check=False)

    def program(self, directory: Path) -> Program:
        mount = directory / "mount"
        mount.mkdir()
        server = f"{self.file_system}.efs.us-east-1.amazonaws.com:/"
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", server, str(mount)]
        subprocess.run(command, check=True)
        self.mounted.append(mount)
        entry = {"fsTypes": ["tmpfs"], "mountPoint": str(mount)}
        systems = directory / "file-systems.yaml"
        systems.write_text(json.dumps({"fileSystems": {self.file_system: entry}}))
        flags = (f"--file-systems={systems}", "--aws-region=us-east-1")
        return Program(argv=(sys.executable, "-m", "efs_provisioner", *flags), env=IN_POD)

    def assets(self, directory: Path) -> Collection[str]:
        mount = directory / "mount"
        return [path.name for path in mount.iterdir() if path.name != ".external-storage"]

    def traces(self, directory: Path) -> Collection[str]:
        private = directory / "mount" / ".external-storage"
        places = ("records", "records.tmp", "new", "trash")
        return [path.name for place in places for path in (private / place).glob("*")]


class TestDirectories(Directories, Conformance):
    """What everybody promises."""


class TestDirectoryCrashes(Directories, CrashSweep):
    """Its workers are killed at their system calls, too: a sample, all with CRASH_SWEEP=full. At
    API requests, which are those of access points, only then."""

    traces_children = True
    system_calls = 4
    if os.environ.get("CRASH_SWEEP") != "full":
        test_killed_at_any_request_of_a_provisioning = None  # type: ignore[assignment]
        test_killed_at_any_request_of_a_deletion = None  # type: ignore[assignment]
