"""Calls of AWS that a claim costs in its life, in both modes.

    hack/bench/run efs [--json] [--claims N]

Counted by the fault layer of efs/tests before moto.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.testing import ControlPlane, Program, ProgramProcess, Sandbox

TESTS = Path(__file__).resolve().parents[2] / "efs" / "tests"
# A process lists the access points of a file system once, whatever the number of claims.
ONCE = "DescribeAccessPoints"


def measure(plane: ControlPlane, efs: Any, mode: str, claims: int, directory: Path) -> float:  # noqa: ANN401
    """Calls a claim, made and deleted."""
    file_system = efs.make_file_system()
    mount = directory / mode
    mount.mkdir()
    server = f"{file_system}.efs.us-east-1.amazonaws.com:/"
    subprocess.run(["mount", "-t", "tmpfs", server, str(mount)], check=True)
    systems = directory / f"{mode}.yaml"
    entry = {"fsTypes": ["tmpfs"], "mountPoint": str(mount)}
    systems.write_text(json.dumps({"fileSystems": {file_system: entry}}))
    command = (sys.executable, "-m", "efs_provisioner", f"--file-systems={systems}")
    api = Client(auth.load(kubeconfig=str(plane.kubeconfig)))
    name = f"bench-{uuid.uuid4().hex[:8]}"
    program = ProgramProcess(
        Program(argv=command, env=efs.environment),
        name=f"example.com/{name}",
        kubeconfig=plane.kubeconfig,
        log=directory / f"{mode}.log",
    )
    box = Sandbox(api=api, namespace="default", provisioner=program.name)
    try:
        program.start()
        before = len(efs.calls)
        storage_class = box.storage_class(f"-{name}", parameters={"provisioningMode": mode})
        names = [f"{name}-{number}" for number in range(claims)]
        box.claims_at_once(names, storage_class)
        box.wait_bound(*names)
        box.delete_claims(*names)
        box.wait(lambda: not box.volumes(), "all volumes are gone")
        made = [call.operation for call in efs.calls[before:]]
        return (len(made) - min(made.count(ONCE), 1)) / claims
    finally:
        program.kill()
        box.clean_up()
        api.close()
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="hack/bench/run efs", description=__doc__)
    parser.add_argument("--claims", type=int, default=50)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    given = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    faulty: Any = importlib.import_module("faulty_efs")
    with (
        tempfile.TemporaryDirectory() as directory,
        faulty.FaultyEfs() as efs,
        ControlPlane() as plane,
    ):
        result = {
            key: measure(plane, efs, mode, given.claims, Path(directory))
            for key, mode in (
                ("aws_calls_per_claim_access_point", "efs-ap"),
                ("aws_calls_per_claim_directory", "efs-dir"),
            )
        }
    if given.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:34} {value}")


if __name__ == "__main__":
    main()
