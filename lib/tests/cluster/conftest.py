"""Pods, and what of a cluster can be seen from outside of it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from external_storage.testing import Cluster
from external_storage.testing.cluster import layout

WAIT = "--timeout=120s"


@pytest.fixture
def space(cluster: Cluster) -> Iterator[str]:
    """A namespace of this test's own, deleted after it with all its pods; not waited for."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


def pod(name: str, script: str, **spec: Any) -> str:
    """A pod whose container, called ``main``, runs ``script`` in a shell; as JSON."""
    container = {
        "name": "main",
        "image": layout.TOOLS_IMAGE,
        "imagePullPolicy": "Never",
        "command": ["sh", "-c", script],
        **spec.pop("container", {}),
    }
    body = {"terminationGracePeriodSeconds": 0, "containers": [container], **spec}
    metadata = {"name": name, "labels": {"app": name}}
    return json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": body})


@dataclass(frozen=True, slots=True)
class Traces:
    """By what a cluster can be told on this machine, taken while it runs."""

    directory: Path
    namespaces: tuple[str, ...]

    @classmethod
    def of(cls, directory: Path, pid: int) -> Traces:
        """``pid``: one of its processes."""
        kinds = ("net", "mnt", "pid")
        found = tuple(str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for kind in kinds)
        assert not {str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in kinds} & set(found)
        return cls(directory, found)

    def left(self) -> list[str]:
        """What is still there; empty when the cluster has gone without a trace."""
        name = self.directory.name
        cgroups = [*Path("/sys/fs/cgroup").glob(name), *Path("/sys/fs/cgroup").glob(f"*/{name}")]
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        loops = subprocess.run(["losetup", "--list"], capture_output=True, text=True, check=True)
        return [
            *(str(path) for path in (self.directory, *cgroups) if path.exists()),
            *(line for line in (*mounts, *loops.stdout.splitlines()) if name in line),
            *(f"process {pid}" for pid in self.processes()),
        ]

    def processes(self) -> list[int]:
        """Those in its namespaces, and those that were given its directory."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                own = {str((path / "ns" / kind).readlink()) for kind in ("net", "mnt", "pid")}
                is_told = self.directory.name.encode() in (path / "cmdline").read_bytes()
                if own & set(self.namespaces) or is_told:
                    found.append(int(path.name))
        return found
