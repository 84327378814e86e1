"""nfs-client-provisioner keeps the promises that every provisioner makes, also when it is killed.

The share is a directory of this machine: to the provisioner one mount is as good as another, if
its file of servers says to expect it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

import yaml

from external_storage.testing import Conformance, CrashSweep, Program, UnderTest
from external_storage.testing.mounts import found_at

DEPLOY = Path(__file__).parents[1] / "deploy"
KEPT = ("records", "new", "trash", "archives")


class NfsClient(UnderTest):
    """How nfs-client-provisioner is run."""

    manifests = (DEPLOY / "namespace.yaml", DEPLOY / "rbac.yaml")
    class_parameters = {"onDelete": "delete"}
    bad_parameters = {"onDelete": "remove", "pathPattern": "../${.PVC.name}", "gid": "0"}

    def program(self, directory: Path) -> Program:
        share = directory / "share"
        share.mkdir()
        there = found_at(share)
        entry = {
            "server": "nfs.example.com",
            "path": "/exports",
            "mountPoint": str(share),
            "fsTypes": [there.fs_type],
            "source": there.source,
        }
        file = directory / "servers.yaml"
        file.write_text(yaml.safe_dump({"servers": {"here": entry}}))
        command = (sys.executable, "-m", "nfs_client_provisioner", f"--servers={file}")
        return Program(argv=command)

    def assets(self, directory: Path) -> Collection[str]:
        return [path.name for path in (directory / "share").iterdir() if path.name[0] != "."]

    def traces(self, directory: Path) -> Collection[str]:
        private = directory / "share" / ".external-storage"
        return [path.name for place in KEPT for path in (private / place).glob("*")]


class TestConformance(NfsClient, Conformance):
    """What everybody promises."""


class TestCrashes(NfsClient, CrashSweep):
    """A sample of the system calls, all with CRASH_SWEEP=full."""

    traces_children = True
