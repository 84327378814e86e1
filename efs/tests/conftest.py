"""AWS's place taken by moto and our fault layer, and the parts of the provisioner upon it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

# So that they find their helpers, as ``tests.faulty_efs``.
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.access_points import Rig
from tests.faulty_efs import FaultyEfs
from tests.serving import FileSystem, Serving, Users, run, unmount_all

from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.testing import ControlPlane, Program, ProgramProcess

DEPLOY = Path(__file__).parents[1] / "deploy"
NAME = "example.com/efs-directories"


@pytest.fixture(scope="session")
def _efs_server() -> Iterator[FaultyEfs]:
    with FaultyEfs() as server:
        yield server


@pytest.fixture
def efs(_efs_server: FaultyEfs, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyEfs]:
    """EFS without access points and faults; this process meets it in AWS's place, too."""
    _efs_server.reset()
    for key, value in _efs_server.environment.items():
        monkeypatch.setenv(key, value)
    yield _efs_server
    # Not left to whoever comes next: the conformance suite has a server without this fixture.
    _efs_server.clear_faults()


@pytest.fixture
def file_system(efs: FaultyEfs) -> str:
    return efs.make_file_system(targets=True)


@pytest.fixture
def rig(efs: FaultyEfs, file_system: str) -> Rig:
    return Rig(efs, file_system)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Any]:
    """Mount a tmpfs that says to be of ``server:path``; all are unmounted at the end."""
    places: list[Path] = []

    def mount(source: str, name: str = "mount") -> Path:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", source, str(place)]
        subprocess.run(command, check=True)
        places.append(place)
        return place

    yield mount
    for place in places:
        # Lazily: a worker that is being killed may still be in it.
        subprocess.run(["umount", "--lazy", str(place)], check=False, capture_output=True)


# -- the program on two mounted file systems


@pytest.fixture(scope="module")
def systems(
    _efs_server: FaultyEfs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[FileSystem]]:
    """Two, mounted."""
    _efs_server.reset()
    with ExitStack() as stack:
        made = []
        for number in (1, 2):
            root = tmp_path_factory.mktemp("file-system")
            system = FileSystem(
                id=_efs_server.make_file_system(targets=True),
                server=f"127.0.0.{number}",  # a name that can be resolved
                top=root / "top",
                point=root / "point",
            )
            for path in (system.top, system.point):
                path.mkdir()
            run("mount", "-t", "tmpfs", "-o", "size=16m", f"{system.server}:/", system.top)
            stack.callback(run, "umount", "--lazy", system.top)
            system.mount()
            stack.callback(unmount_all, system.point)
            made.append(system)
        yield made


@pytest.fixture(scope="module")
def serving(
    _efs_server: FaultyEfs,
    control_plane: ControlPlane,
    systems: list[FileSystem],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Serving]:
    for name in ("namespace.yaml", "rbac.yaml"):
        control_plane.kubectl("apply", "-f", str(DEPLOY / name))
    account = control_plane.service_account_kubeconfig("efs-provisioner", "efs-provisioner")
    directory = tmp_path_factory.mktemp("program")
    file = directory / "file-systems.yaml"
    entries = {
        system.id: {"dnsName": system.server, "mountPoint": str(system.point), "fsTypes": ["tmpfs"]}
        for system in systems
    }
    file.write_text(json.dumps({"fileSystems": entries}))
    argv = (sys.executable, "-m", "efs_provisioner", f"--file-systems={file}")
    environment = {"POD_NAMESPACE": "efs-provisioner", **_efs_server.environment}
    program = ProgramProcess(
        # Short, as a test waits for what is tried again.
        Program(argv=(*argv, "--retry-interval-max=1s"), env=environment),
        name=NAME,
        kubeconfig=account,
        log=directory / "log",
    )
    program.start()
    beside = (f"--kubeconfig={account}", f"--provisioner-name={NAME}")
    try:
        yield Serving(program, systems, (*argv, *beside), environment)
    finally:
        if program.running:
            program.kill()
        sys.stderr.write(program.tail())


@pytest.fixture
def users(control_plane: ControlPlane, namespace: str, serving: Serving, efs: FaultyEfs) -> Any:
    api = Client(auth.load(kubeconfig=str(control_plane.kubeconfig)))
    one = serving.systems[0]
    made = Users(api=api, namespace=namespace, provisioner=NAME, efs=efs, serving=serving, one=one)
    try:
        yield made
        made.delete_claims()
        made.wait(lambda: not made.volumes(), "all volumes are gone")
    finally:
        made.clean_up()
        for system in serving.systems:
            unmount_all(system.point)
            system.mount()
            for left in system.shown():
                run("rm", "-r", system.top / left)
        api.close()
