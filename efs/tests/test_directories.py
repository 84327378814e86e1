"""Directories and the directories of access points: the program on two mounted file systems.

A tmpfs that says to be of the file system's server stands in the place of each; it is mounted
elsewhere, too, so that it outlives what the tests unmount. One process serves all tests.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.faulty_efs import FaultyEfs

from external_storage import PersistentVolume, PersistentVolumeClaim
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.names import ANN_GID, ANN_PROVISIONED_BY
from external_storage.testing import ControlPlane, Program, ProgramProcess, Sandbox

DEPLOY = Path(__file__).parents[1] / "deploy"
NAME = "example.com/efs-directories"
PRIVATE = ".external-storage"


@dataclass
class FileSystem:
    """One that is mounted in our pod."""

    id: str
    server: str
    top: Path
    """Of the whole of it, whether it is mounted for the provisioner or not."""
    point: Path
    """Where the provisioner has it."""

    def mount(self) -> None:
        _run("mount", "--bind", self.top, self.point)

    def unmount(self) -> None:
        # Lazily: a worker of the provisioner may be in it.
        _run("umount", "--lazy", self.point)

    def shown(self) -> list[str]:
        """What is there beside what is the provisioner's own."""
        return sorted(path.name for path in self.top.iterdir() if path.name != PRIVATE)


@dataclass
class Serving:
    """The process, and how the operator's commands are run beside it."""

    program: ProgramProcess
    systems: Sequence[FileSystem]
    command: tuple[str, ...]
    environment: dict[str, str]

    def restart(self) -> None:
        """What it has learnt is forgotten."""
        self.program.kill()
        self.program.start()

    def run(self, name: str, *flags: str) -> tuple[int, str]:
        """Exit code and output of one of the operator's commands."""
        command = (*self.command[:3], name, *self.command[3:], *flags)
        ran = subprocess.run(
            command,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return ran.returncode, ran.stdout + ran.stderr


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
            _run("mount", "-t", "tmpfs", "-o", "size=16m", f"{system.server}:/", system.top)
            stack.callback(_run, "umount", "--lazy", system.top)
            system.mount()
            stack.callback(_unmount_all, system.point)
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


@dataclass(kw_only=True)
class Users(Sandbox):
    """What users and admins see and do on the file systems."""

    efs: FaultyEfs
    serving: Serving
    one: FileSystem
    """Of every class that does not say otherwise."""
    _classes: int = field(default=0)

    def kind(self, **parameters: str) -> Any:
        """A class with these parameters."""
        self._classes += 1
        given = {"fileSystemId": self.one.id, **parameters}
        given = {key: value for key, value in given.items() if value}
        return self.storage_class(f"-{self._classes}", parameters=given)

    def bound(self, name: str = "data", **parameters: str) -> PersistentVolume:
        self.claim(name, self.kind(**parameters))
        return self.wait_bound(name)[0]

    def wait_gone(self, *volumes: PersistentVolume) -> None:
        for volume in volumes:
            self.wait(lambda name=volume.name: self.get_volume(name) is None, "the volume is gone")

    def wait_told(self, about: str, *words: str) -> None:
        def told() -> bool:
            return any(all(w in event.message for w in words) for event in self.events(about))

        self.wait(told, f"an event about {about} says {' ... '.join(words)}")


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
            _unmount_all(system.point)
            system.mount()
            for left in system.shown():
                _run("rm", "-r", system.top / left)
        api.close()


def test_a_claim_becomes_a_directory_of_its_own_group_without_a_call_of_aws(users: Users) -> None:
    volume = users.bound()
    name = f"data-{volume.name}"
    assert volume.spec.nfs is not None
    assert (volume.spec.nfs.server, volume.spec.nfs.path) == (users.one.server, f"/{name}")
    assert "nfsvers=4.1" in volume.spec.mount_options
    there = (users.one.top / name).stat()
    assert str(there.st_gid) == volume.metadata.annotations[ANN_GID]
    assert stat.S_IMODE(there.st_mode) == 0o2771
    (users.one.top / name / "file").write_text("data")
    users.delete_claims()
    users.wait_gone(volume)
    assert users.one.shown() == []
    assert users.efs.operations() == {}


def test_unmounted_under_the_running_provisioner_claims_wait_and_nothing_is_on_the_local_disk(
    users: Users,
) -> None:
    storage_class = users.kind()
    users.claim("before", storage_class)
    (before,) = users.wait_bound("before")
    users.one.unmount()
    users.claim("data", storage_class)
    users.delete_claims("before")
    users.wait_told("data", "not mounted")
    users.wait_told(before.name, "not mounted")
    status, health = users.serving.program.get("/healthz?verbose")
    assert (status, "not mounted" in health) == (200, True), health
    assert list(users.one.point.iterdir()) == []
    assert users.one.shown() == [f"before-{before.name}"]
    assert users.get_claim("data").spec.volume_name == ""
    users.one.mount()
    (volume,) = users.wait_bound("data")
    users.wait_gone(before)
    assert users.one.shown() == [f"data-{volume.name}"]


@pytest.mark.parametrize("mode", ["efs-dir", "efs-ap"])
def test_archived_data_is_kept_under_another_name(users: Users, mode: str) -> None:
    volume = users.bound(provisioningMode=mode, onDelete="archive")
    directory = _directory(users, volume)
    directory.mkdir(exist_ok=True)  # of an access point, as its first mount does
    (directory / "file").write_text("kept")
    users.delete_claims()
    users.wait_gone(volume)
    (archived,) = users.one.shown()
    assert archived.startswith("archived-")
    assert (users.one.top / archived / "file").read_text() == "kept"
    assert users.efs.access_points() == []


def test_retained_data_stays_where_it_is(users: Users) -> None:
    volume = users.bound(onDelete="retain")
    users.delete_claims()
    users.wait_gone(volume)
    assert users.one.shown() == [f"data-{volume.name}"]


def predictable(users: Users, mode: str = "efs-dir", path: str = "shared", **given: str) -> Any:
    """A class whose claims all want one directory."""
    return users.kind(
        provisioningMode=mode, subPathPattern=path, ensureUniqueDirectory="false", **given
    )


@pytest.mark.parametrize(
    ("first", "second"), [("efs-dir", "efs-ap"), ("efs-ap", "efs-dir"), ("efs-dir", "efs-dir")]
)
def test_no_volume_of_any_mode_gets_the_directory_of_another(
    users: Users, first: str, second: str
) -> None:
    users.claim("one", predictable(users, first, "above/shared", onDelete="delete"))
    (volume,) = users.wait_bound("one")
    directory = users.one.top / "above" / "shared"
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "file").write_text("of one")
    paths = {"same": "above/shared", "below": "above/shared/below", "above": "above"}
    for name, path in paths.items():
        users.claim(name, predictable(users, second, path, onDelete="delete"))
    for name in paths:
        users.wait_told(name, f"volume {volume.name}")
    users.delete_claims(*paths)
    users.wait(lambda: len(users.claims()) == 1, "the other claims are gone")
    assert (directory / "file").read_text() == "of one"
    users.delete_claims("one")
    users.wait_gone(volume)
    assert not directory.exists()


def test_the_directory_of_a_volume_of_efs_provisioner_is_nobody_elses(users: Users) -> None:
    old = _old_volume(users, gid=2000)
    name = f"old-{old.name}"
    (users.one.top / name).mkdir()
    for mode in ("efs-dir", "efs-ap"):
        users.claim(mode, predictable(users, mode, name, onDelete="delete"))
        users.wait_told(mode, f"volume {old.name}")
    users.delete_claims()
    users.wait(lambda: not users.claims(), "the claims are gone")
    assert users.one.shown() == [name]
    users.api.patch(PersistentVolume, old.name, {"spec": {"claimRef": {"uid": "gone"}}})
    users.wait_gone(old)


@pytest.mark.parametrize(("on_delete", "stays"), [("delete", False), ("", True)])
def test_the_directory_of_an_access_point_is_removed_only_if_the_class_says_so(
    users: Users, on_delete: str, stays: bool
) -> None:
    volume = users.bound(provisioningMode="efs-ap", onDelete=on_delete)
    directory = _directory(users, volume)
    directory.mkdir()
    (directory / "file").write_text("data")
    users.delete_claims()
    users.wait_gone(volume)
    assert users.efs.access_points() == []
    assert directory.exists() is stays


@pytest.mark.parametrize("mode", ["efs-dir", "efs-ap"])
def test_an_access_point_of_others_keeps_a_directory_only_from_within(
    users: Users, mode: str
) -> None:
    """An admin's own for all, or for all below a class's basePath, is not in the way."""
    storage_class = users.kind(provisioningMode=mode, onDelete="delete", basePath="/base")
    volumes = []
    for name in ("goes", "kept"):
        users.claim(name, storage_class)
        volumes += users.wait_bound(name)
    goes, kept = (_directory(users, volume) for volume in volumes)
    for directory in (goes, kept):
        directory.mkdir(exist_ok=True, parents=True)
    for path in ("/", "/base", f"/{(kept / 'below').relative_to(users.one.top)}"):
        users.efs.add_access_points(users.one.id, 1, first_gid=1, path=path)
    users.serving.restart()
    if mode == "efs-dir":
        # For directories AWS is asked for nothing: what was listed for others is all that is known.
        users.claim("other", users.kind(provisioningMode="efs-ap"))
        users.wait_bound("other")
    users.delete_claims()
    users.wait_gone(*volumes)
    assert (goes.exists(), kept.exists()) == (False, True)
    users.wait_told(volumes[1].name, "is kept", "fsap-")


def test_volumes_of_efs_provisioner_are_deleted_and_their_groups_are_not_given_away(
    users: Users,
) -> None:
    old = _old_volume(users, gid=2000)
    directory = users.one.top / f"old-{old.name}"
    directory.mkdir()
    new = users.bound(gidMin="2000", gidMax="2001")
    assert new.metadata.annotations[ANN_GID] == "2001"
    # As soon as it is Released: its claim is gone.
    users.api.patch(PersistentVolume, old.name, {"spec": {"claimRef": {"uid": "gone"}}})
    users.wait_gone(old)
    assert users.one.shown() == [f"data-{new.name}"]


def test_the_file_system_with_the_fewest_volumes_is_chosen(users: Users, serving: Serving) -> None:
    anywhere = users.kind(fileSystemId="")
    for number in range(4):
        users.claim(f"data-{number}", anywhere)
        users.wait_bound(f"data-{number}")
    assert [len(system.shown()) for system in serving.systems] == [2, 2]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("../../etc", ".."),
        ("/etc", "/"),
        (PRIVATE, PRIVATE),
        ("a\nb", "control character"),
    ],
)
def test_a_hostile_name_makes_nothing(users: Users, value: str, told: str) -> None:
    pattern = "${.PVC.annotations.dir}"
    storage_class = users.kind(subPathPattern=pattern, ensureUniqueDirectory="false")
    body = {
        "metadata": {"name": "data", "annotations": {"dir": value}},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": storage_class.name,
            "resources": {"requests": {"storage": "1Mi"}},
        },
    }
    users.api.create(PersistentVolumeClaim, body, namespace=users.namespace)
    users.wait_event("data", "ProvisioningFailed")
    users.wait_told("data", told)
    assert users.one.shown() == []


def test_orphans_and_missing_find_what_has_lost_its_other_half(
    users: Users, serving: Serving
) -> None:
    lost, point = users.bound("lost"), users.bound("point", provisioningMode="efs-ap")
    for command in ("orphans", "missing"):
        code, text = serving.run(command)
        assert (code, text) == (0, "nothing found\n")
    # An access point is deleted in the console, a directory by hand.
    [made] = users.efs.access_points()
    users.efs.delete_access_point(made["AccessPointId"])
    _directory(users, lost).rmdir()
    code, text = serving.run("missing")
    assert code == 1
    assert {lost.name, point.name} <= set(text.split())


def test_an_orphaned_access_point_is_deleted_when_told(users: Users, serving: Serving) -> None:
    volume = users.bound(provisioningMode="efs-ap")
    # An admin removes the volume by force.
    users.api.patch(PersistentVolume, volume.name, {"metadata": {"finalizers": None}})
    users.api.patch(
        PersistentVolume, volume.name, {"spec": {"persistentVolumeReclaimPolicy": "Retain"}}
    )
    users.delete_claims()
    users.wait(lambda: not users.claims(), "the claim is gone")
    users.api.delete(PersistentVolume, volume.name, uid=volume.uid)
    users.wait_gone(volume)
    [made] = users.efs.access_points()
    code, text = serving.run("orphans")
    assert code == 1
    assert {made["AccessPointId"], volume.name} <= set(text.split())
    assert users.efs.access_points() == [made]
    by_hand = _volume_by_hand(users, f"{users.one.id}:/below:{made['AccessPointId']}")
    assert serving.run("orphans", "--delete") == (0, "nothing found\n")
    users.api.delete(PersistentVolume, by_hand.name, uid=by_hand.uid)
    users.wait_gone(by_hand)
    users.efs.denied.add("DeleteAccessPoint")
    code, text = serving.run("orphans", "--delete")
    assert code == 1
    assert "not deleted: AWS denies elasticfilesystem:DeleteAccessPoint" in text
    users.efs.clear_faults()
    code, text = serving.run("orphans", "--delete")
    assert code == 0
    assert f"{made['AccessPointId']}: deleted" in text
    assert users.efs.access_points() == []


def test_the_doctor_finds_what_is_missing(users: Users, serving: Serving) -> None:
    code, text = serving.run("doctor", "--write")
    assert code == 0, text
    assert users.efs.access_points() == []
    users.one.unmount()
    users.efs.denied = {"CreateAccessPoint", "DescribeMountTargets"}
    code, text = serving.run("doctor", "--write")
    assert code == 1
    failed = {line.split("  ")[1].strip() for line in text.splitlines() if line[:6] == "FAILED"}
    other = serving.systems[1].id
    assert failed == {
        f"{users.one.id}: DescribeMountTargets",
        f"{users.one.id}: CreateAccessPoint",
        f"{users.one.id}: mount",
        f"{other}: DescribeMountTargets",
        f"{other}: CreateAccessPoint",
    }


def _directory(users: Users, volume: PersistentVolume) -> Path:
    """Of a volume of either mode."""
    return users.one.top / volume.metadata.annotations["efs.external-storage/path"].lstrip("/")


def _old_volume(users: Users, *, gid: int) -> PersistentVolume:
    """As efs-provisioner wrote them."""
    name = f"pvc-{users.namespace}"
    fields = {
        "metadata": {
            "name": name,
            "annotations": {ANN_GID: str(gid), ANN_PROVISIONED_BY: users.provisioner},
        },
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "capacity": {"storage": "1Mi"},
            "claimRef": {"namespace": users.namespace, "name": "old"},
            "nfs": {"server": users.one.server, "path": f"/old-{name}"},
            "persistentVolumeReclaimPolicy": "Delete",
            "storageClassName": "efs",
        },
    }
    return users.make(PersistentVolume, fields)


def _volume_by_hand(users: Users, handle: str) -> PersistentVolume:
    """As an admin makes one for the CSI driver."""
    fields = {
        "metadata": {"name": f"by-hand-{users.namespace}"},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "capacity": {"storage": "1Mi"},
            "csi": {"driver": "efs.csi.aws.com", "volumeHandle": handle},
        },
    }
    return users.make(PersistentVolume, fields)


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, timeout=60)


def _unmount_all(point: Path) -> None:
    while os.path.ismount(point):
        _run("umount", "--lazy", point)
