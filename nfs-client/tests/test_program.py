"""The program on a real control plane: outages of a server, of a replica, and of a class."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from external_storage import PersistentVolume, PersistentVolumeClaim, StorageClass
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.names import ANN_PROVISIONED_BY
from external_storage.testing import ControlPlane, FaultProxy, Program, ProgramProcess, Sandbox

Started = Callable[..., ProgramProcess]

# What is given last counts: the flags of a test come after those of ProgramProcess.
_WITH_FLAGS = "import sys; from nfs_client_provisioner.__main__ import main; sys.argv += {}; main()"


@pytest.fixture
def cluster(control_plane: ControlPlane, namespace: str) -> Iterator[Sandbox]:
    api = Client(auth.load(kubeconfig=str(control_plane.kubeconfig)))
    made = Sandbox(api=api, namespace=namespace, provisioner=f"example.com/{namespace}")
    yield made
    made.clean_up()
    api.close()


@pytest.fixture
def start(control_plane: ControlPlane, cluster: Sandbox, tmp_path: Path) -> Iterator[Started]:
    """Starts a program on shares by name; ended with the test."""
    programs: list[ProgramProcess] = []

    def started(
        servers: Mapping[str, Mapping[str, Any]], *flags: str, kubeconfig: Path | None = None
    ) -> ProgramProcess:
        number = len(programs)
        file = tmp_path / f"servers-{number}.yaml"
        file.write_text(yaml.safe_dump({"servers": dict(servers)}))
        code = _WITH_FLAGS.format([f"--servers={file}", *flags])
        program = ProgramProcess(
            Program(argv=(sys.executable, "-c", code)),
            name=cluster.provisioner,
            kubeconfig=kubeconfig or control_plane.kubeconfig,
            log=tmp_path / f"program-{number}.log",
        )
        programs.append(program)
        program.start()
        return program

    yield started
    for program in programs:
        if program.running:
            program.kill()
        sys.stderr.write(program.tail())


def names_in(share: Path) -> list[str]:
    return sorted(path.name for path in share.iterdir() if path.name[0] != ".")


@pytest.mark.parametrize("then", ["deleted", "made again"])
def test_n25_a_volume_ends_as_its_class_said_when_it_was_made(
    cluster: Sandbox, start: Started, share: Path, share_entry: Any, then: str
) -> None:
    start({"one": share_entry(share)})
    made = cluster.storage_class(parameters={"onDelete": "archive", "pathPattern": "data"})
    cluster.claim("data", made)
    (volume,) = cluster.wait_bound("data")
    (share / "data" / "file").write_text("precious")
    cluster.api.delete(StorageClass, made.name, uid=made.uid)
    if then == "made again":
        cluster.storage_class(parameters={"onDelete": "delete"})
    cluster.delete_claims()
    cluster.wait(lambda: cluster.get_volume(volume.name) is None, "the volume is gone")
    (archive,) = names_in(share)
    assert (share / archive / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("parameters", "left"),
    [
        ({"archiveOnDelete": "false"}, []),
        ({"archiveOnDelete": "true", "unknownToUs": "x"}, ["archived-old"]),
        ({"onDelete": "retain"}, ["old"]),
    ],
    ids=["delete", "archive", "retain"],
)
def test_a_volume_of_nfs_subdir_ends_as_its_class_says(
    cluster: Sandbox,
    start: Started,
    share: Path,
    share_entry: Any,
    parameters: dict[str, str],
    left: list[str],
) -> None:
    (share / "old").mkdir(mode=0o777)
    storage_class = cluster.storage_class(parameters=parameters)
    volume = cluster.make(
        PersistentVolume,
        {
            "metadata": {
                "name": f"pvc-{uuid.uuid4()}",
                "annotations": {ANN_PROVISIONED_BY: cluster.provisioner},
            },
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "capacity": {"storage": "1Mi"},
                "claimRef": {"namespace": "default", "name": "gone", "uid": str(uuid.uuid4())},
                "nfs": {"server": "nfs.example.com", "path": "/exports/share/old"},
                "persistentVolumeReclaimPolicy": "Delete",
                "storageClassName": storage_class.name,
            },
        },
    )
    start({"one": share_entry(share)})
    cluster.wait(lambda: cluster.get_volume(volume.name) is None, "the volume is gone")
    assert [name[: len("archived-old")] for name in names_in(share)] == left


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[tuple[Path, ExitStack]]:
    """A file system of its own that freezes when the stack is asked to, as a server that hangs;
    closing the stack thaws it."""
    if os.geteuid() != 0:
        pytest.skip("a loop mount needs root")
    image, place = tmp_path / "image", tmp_path / "frozen"
    place.mkdir()
    with ExitStack() as stack:
        with image.open("wb") as file:
            file.truncate(32 << 20)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True)
        stack.callback(lambda: subprocess.run(["umount", place], check=True))
        with ExitStack() as thaw:
            yield place, thaw


def freeze(place: Path, thaw: ExitStack) -> None:
    subprocess.run(["fsfreeze", "--freeze", place], check=True)
    thaw.callback(lambda: subprocess.run(["fsfreeze", "--unfreeze", place], check=True))


def test_n28_a_server_that_hangs_holds_up_only_its_own_claims(
    frozen: tuple[Path, ExitStack],  # first: it is unmounted when the program has ended
    cluster: Sandbox,
    start: Started,
    share: Path,
    share_entry: Any,
) -> None:
    place, thaw = frozen
    program = start(
        {"good": share_entry(share), "bad": share_entry(place, path="/exports/bad")},
        "--call-timeout=1",
        "--retry-interval-max=1",
    )
    classes = {
        name: cluster.storage_class(f"-{name}", parameters={"server": name})
        for name in ("good", "bad")
    }
    freeze(place, thaw)
    for number in range(5):
        cluster.claim(f"bad-{number}", classes["bad"])
    event = cluster.wait_event("bad-0", "ProvisioningInProgress")
    assert "share 'bad' (nfs.example.com:/exports/bad) is not available" in event.message
    cluster.claims_at_once([f"good-{number}" for number in range(5)], classes["good"])
    cluster.wait_bound(*(f"good-{number}" for number in range(5)))
    assert program.metric(r'external_storage_share_available\{share="bad"') == 0
    assert program.metric(r'external_storage_share_available\{share="good"') == 1
    assert program.metric("external_storage_paused") == 0
    assert "[-] backend-parts: share 'bad'" in program.get("/healthz?verbose")[1]
    assert (program.get("/healthz")[0], program.get("/readyz")[0]) == (200, 200)
    thaw.close()
    cluster.wait_bound(*(f"bad-{number}" for number in range(5)))
    assert "[+] backend-parts: ok" in program.get("/healthz?verbose")[1]


def test_n29_a_delete_that_the_leader_died_in_is_finished_once_by_the_next(
    control_plane: ControlPlane, cluster: Sandbox, start: Started, share: Path, share_entry: Any
) -> None:
    leader_flags = (
        "--leader-elect=true",
        "--leader-elect-lease-duration=2",
        "--leader-elect-renew-deadline=1.5",
        "--leader-elect-retry-period=0.2",
        f"--leader-elect-resource-namespace={cluster.namespace}",
    )
    servers = {"one": share_entry(share)}
    with FaultProxy(control_plane) as proxy:
        first = start(servers, *leader_flags, kubeconfig=proxy.kubeconfig())
        cluster.wait(lambda: first.metric("external_storage_leader"), "the first one leads")
        second = start(servers, *leader_flags)
        cluster.claim("data", cluster.storage_class(parameters={"pathPattern": "data"}))
        (volume,) = cluster.wait_bound("data")
        (share / "data" / "file").write_text("precious")
        # By then the directory is archived, and the volume says nothing of it.
        proxy.on("delete", "persistentvolumes").kill(first.pid, when="before")
        cluster.delete_claims()
        cluster.wait(lambda: cluster.get_volume(volume.name) is None, "the volume is gone")
        assert not first.running
        assert second.metric("external_storage_leader") == 1
    (archive,) = names_in(share)
    assert (share / archive / "file").read_text() == "precious"
    assert not list((share / ".external-storage" / "records").iterdir())


def test_a_claim_that_grows_is_noted_and_told(
    cluster: Sandbox, start: Started, share: Path, share_entry: Any
) -> None:
    start({"one": share_entry(share)})
    cluster.claim("data", cluster.storage_class(allowVolumeExpansion=True))
    cluster.wait_bound("data")
    claim = cluster.get_claim("data")
    patch = {"spec": {"resources": {"requests": {"storage": "5Mi"}}}}
    cluster.api.patch(type(claim), "data", patch, namespace=cluster.namespace)
    cluster.wait(
        lambda: cluster.get_claim("data").status.capacity.get("storage") == "5Mi", "it has 5Mi"
    )
    cluster.wait(
        lambda: any(
            "has no limit" in event.message for event in cluster.events("data", "SizeNotEnforced")
        ),
        "its user is told",
    )


def command(cluster: Sandbox, name: str, *flags: str) -> tuple[int, str]:
    """One of the operator's commands, beside the provisioner that runs with the same servers."""
    argv = [f"--provisioner-name={cluster.provisioner}", *flags]
    done = subprocess.run(
        [sys.executable, "-m", "nfs_client_provisioner", name, *argv],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_commands_tell_what_is_orphaned_and_what_is_missing(
    control_plane: ControlPlane,
    cluster: Sandbox,
    start: Started,
    share: Path,
    share_entry: Any,
    tmp_path: Path,
) -> None:
    start({"one": share_entry(share)})
    storage_class = cluster.storage_class(
        parameters={"pathPattern": "${.PVC.name}"}, reclaimPolicy="Retain"
    )
    for name in ("kept", "lost"):
        cluster.claim(name, storage_class)
    kept, lost = cluster.wait_bound("kept", "lost")
    where = (f"--kubeconfig={control_plane.kubeconfig}", f"--servers={tmp_path / 'servers-0.yaml'}")
    assert command(cluster, "orphans", *where) == (0, "nothing found\n")
    (share / "lost").rename(share / "elsewhere")
    code, told = command(cluster, "missing", *where)
    assert (code, lost.name in told, kept.name in told) == (1, True, False)
    cluster.delete_claims()
    for volume in (kept, lost):  # by hand: nobody else ends a volume that is Retained
        control_plane.kubectl("delete", "pv", volume.name)
    code, told = command(cluster, "orphans", *where)
    assert (code, told.count("pvc-"), told.count("(gone)")) == (1, 2, 1)
    code, told = command(cluster, "orphans", "--forget", *where)
    assert (code, told.count("forgotten;")) == (0, 2)
    assert names_in(share) == ["elsewhere", "kept"]
    assert not list((share / ".external-storage/records").iterdir())


def test_n17_a_path_from_an_annotation_that_leaves_the_base_is_told_once(
    cluster: Sandbox, start: Started, share: Path, share_entry: Any
) -> None:
    start({"one": share_entry(share)})
    parameters = {"pathPattern": "${.PVC.annotations.path}"}
    storage_class = cluster.storage_class(parameters=parameters)

    def claim(name: str, path: str) -> None:
        body = {
            "metadata": {"name": name, "annotations": {"path": path}},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "storageClassName": storage_class.name,
                "resources": {"requests": {"storage": "1Mi"}},
            },
        }
        cluster.api.create(PersistentVolumeClaim, body, namespace=cluster.namespace)

    claim("bad", "../elsewhere")
    claim("good", "inside")
    cluster.wait_bound("good")
    event = cluster.wait_event("bad", "ProvisioningFailed")
    assert "pathPattern" in event.message
    # A first retry would come within two seconds.
    time.sleep(3.0)
    claim("later", "later")
    cluster.wait_bound("later")
    (event,) = cluster.events("bad", "ProvisioningFailed")
    assert event.count == 1
    assert names_in(share) == ["inside", "later"]


def test_fifty_volumes_cost_few_requests_and_leave_nothing(
    cluster: Sandbox, start: Started, share: Path, share_entry: Any
) -> None:
    """The same for each: the thousand of hack/bench cost as many."""
    program = start({"one": share_entry(share)})
    storage_class = cluster.storage_class(parameters={"onDelete": "delete"})
    names = [f"data-{number}" for number in range(50)]
    requests = "external_storage_api_requests_total"
    before = program.metric(requests)
    cluster.claims_at_once(names, storage_class)
    cluster.wait_bound(*names)
    made = program.metric(requests)
    cluster.delete_claims()
    cluster.wait(lambda: not cluster.volumes(), "all volumes are gone")
    # Reads the claim, makes the volume, writes two or three events.
    assert (made - before) / len(names) <= 6
    # Reads the volume and its claim, deletes it, takes the finalizer off, writes an event.
    assert (program.metric(requests) - made) / len(names) <= 8
    assert names_in(share) == []
