"""Measures nfs-client-provisioner: many volumes, and the deletion of a big one.

    hack/bench/run nfs-client [--json] [--volumes N] [--files N] [--directory DIR]

The share is a directory of this machine, so the file system of ``--directory`` counts too; what
is to be compared is one figure with another of the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.testing import ControlPlane, Program, ProgramProcess, Sandbox
from external_storage.testing.mounts import found_at

LIMIT_S = 1800.0
ROUNDS = 5
DELETE = {"onDelete": "delete"}
_FILES_A_DIRECTORY = 1000


def program_on(share: Path, sandbox: Sandbox, kubeconfig: Path) -> ProgramProcess:
    there = found_at(share)
    entry = {
        "server": "nfs.example.com",
        "path": "/exports",
        "mountPoint": str(share),
        "fsTypes": [there.fs_type],
        "source": there.source,
    }
    file = share.with_name("servers.yaml")
    file.write_text(yaml.safe_dump({"servers": {"one": entry}}))
    command = (sys.executable, "-m", "nfs_client_provisioner", f"--servers={file}")
    return ProgramProcess(
        Program(argv=command),
        name=sandbox.provisioner,
        kubeconfig=kubeconfig,
        log=share.with_name("log"),
    )


@contextmanager
def running(directory: Path) -> Iterator[tuple[Sandbox, ProgramProcess, Path]]:
    share = directory / "share"
    share.mkdir()
    with ControlPlane() as plane:
        api = Client(auth.load(kubeconfig=str(plane.kubeconfig)))
        namespace = f"bench-{uuid.uuid4().hex[:6]}"
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
        plane.request("POST", "/api/v1/namespaces", body)
        sandbox = Sandbox(
            api=api, namespace=namespace, provisioner="bench/nfs-client", limit_s=LIMIT_S
        )
        program = program_on(share, sandbox, plane.kubeconfig)
        program.start()
        try:
            yield sandbox, program, share
        finally:
            program.kill()
            api.close()


def memory_mib(program: ProgramProcess) -> float:
    """Of the program and its processes, without what they share."""
    kib = 0
    for pid in program.pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return round(kib / 1024, 1)


def many(sandbox: Sandbox, program: ProgramProcess, volumes: int) -> dict[str, float]:
    """Make and delete that many, twice: what grows in the second round is a leak."""
    storage_class = sandbox.storage_class(parameters=DELETE)
    names = [f"claim-{number}" for number in range(volumes)]
    requests = "external_storage_api_requests_total"
    result: dict[str, float] = {}
    for turn in ("", "_again"):
        before = program.metric(requests)
        started = time.monotonic()
        sandbox.claims_at_once(names, storage_class)
        sandbox.wait_bound(*names)
        bound_s, made = time.monotonic() - started, program.metric(requests)
        full_mib = memory_mib(program)
        started = time.monotonic()
        sandbox.delete_claims()
        sandbox.wait(lambda: not sandbox.volumes(), "all volumes are gone")
        result |= {
            f"bound_s{turn}": round(bound_s, 1),
            f"deleted_s{turn}": round(time.monotonic() - started, 1),
            f"requests_per_claim{turn}": round((made - before) / volumes, 2),
            f"requests_per_delete{turn}": round((program.metric(requests) - made) / volumes, 2),
            f"mib_with_all{turn}": full_mib,
            f"mib_after{turn}": memory_mib(program),
        }
    return result


def fill(directory: Path, files: int) -> None:
    for number in range(files):
        below = directory / str(number // _FILES_A_DIRECTORY)
        if number % _FILES_A_DIRECTORY == 0:
            below.mkdir()
        (below / str(number)).touch()


def delete_s(sandbox: Sandbox, share: Path, class_name: str, files: int) -> float:
    """From the deletion of the claim to the end of its volume."""
    name = f"claim-{uuid.uuid4().hex[:6]}"
    sandbox.claim(name, sandbox.storage_class(f"-{class_name}-{name}", parameters=DELETE))
    (volume,) = sandbox.wait_bound(name)
    assert volume.spec.nfs is not None
    fill(share / Path(volume.spec.nfs.path).name, files)
    started = time.monotonic()
    sandbox.delete_claims(name)
    sandbox.wait(lambda: sandbox.get_volume(volume.name) is None, "the volume is gone")
    return time.monotonic() - started


def big(sandbox: Sandbox, share: Path, files: int) -> dict[str, float]:
    """The deletion of a big directory beside that of empty ones."""
    empty = statistics.median(delete_s(sandbox, share, "empty", 0) for _ in range(ROUNDS))
    full = delete_s(sandbox, share, "full", files)
    started = time.monotonic()
    trash = share / ".external-storage" / "trash"
    sandbox.wait(lambda: not list(trash.iterdir()), "the trash is empty")
    return {
        "delete_empty_s": round(empty, 3),
        "delete_full_s": round(full, 3),
        "delete_ratio": round(full / empty, 2),
        "trash_emptied_s": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="hack/bench/run nfs-client", description=__doc__)
    parser.add_argument("--volumes", type=int, default=1000)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--directory", type=Path, help="where the share is made")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=given.directory) as directory,
        running(Path(directory)) as (sandbox, program, share),
    ):
        result = many(sandbox, program, given.volumes) | big(sandbox, share, given.files)
    if given.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:26} {value}")


if __name__ == "__main__":
    main()
