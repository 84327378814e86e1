"""efs-provisioner as a process, on the real control plane, with the rights of its manifests."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from external_storage import PersistentVolumeClaim, StorageClass
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.names import ANN_GID
from external_storage.testing import ControlPlane, FaultProxy, Program, ProgramProcess, Sandbox

if TYPE_CHECKING:
    from tests.faulty_efs import FaultyEfs

DEPLOY = Path(__file__).parents[1] / "deploy"
MODE = {"provisioningMode": "efs-ap"}


@dataclass(kw_only=True)
class Running(Sandbox):
    """The process, and what its users and its admin see."""

    program: ProgramProcess
    proxy: FaultProxy
    efs: FaultyEfs

    def classes(self, name: str) -> list[StorageClass]:
        return [found for found in self.api.list_all(StorageClass) if found.name == name]

    def access_points(self, suffix: str = "", **parameters: str) -> Any:
        """A class of access points."""
        return self.storage_class(suffix, parameters={**MODE, **parameters})


Start = Callable[..., Running]


@pytest.fixture(scope="module")
def account(control_plane: ControlPlane) -> Path:
    """A kubeconfig of the ServiceAccount of the manifests."""
    for name in ("namespace.yaml", "rbac.yaml"):
        control_plane.kubectl("apply", "-f", str(DEPLOY / name))
    return control_plane.service_account_kubeconfig("efs-provisioner", "efs-provisioner")


@pytest.fixture
def start(
    control_plane: ControlPlane, account: Path, namespace: str, efs: FaultyEfs, tmp_path: Path
) -> Iterator[Start]:
    """Start the program with flags; it and all it made are gone at the end."""
    with FaultProxy(control_plane) as proxy:
        api = Client(auth.load(kubeconfig=str(control_plane.kubeconfig)))
        made: list[Running] = []

        def begin(*flags: str, **environment: str) -> Running:
            name = f"example.com/{namespace}"
            # Short, as a test waits for what is tried again.
            flags = (*flags, "--retry-interval-max=2s")
            in_pod = {"POD_NAMESPACE": "efs-provisioner"}
            command = (sys.executable, "-m", "efs_provisioner", *flags)
            program = ProgramProcess(
                Program(argv=command, env={**efs.environment, **in_pod, **environment}),
                name=name,
                kubeconfig=proxy.kubeconfig(for_=account),
                log=tmp_path / "log",
            )
            running = Running(
                api=api,
                namespace=namespace,
                provisioner=name,
                program=program,
                proxy=proxy,
                efs=efs,
            )
            made.append(running)
            program.start()
            return running

        try:
            yield begin
        finally:
            for running in made:
                efs.clear_faults()
                running.delete_claims()
                if running.program.running:
                    running.program.kill()
                running.clean_up()
                sys.stderr.write(running.program.tail())
            api.close()


@pytest.fixture
def file_system(efs: FaultyEfs) -> str:
    return efs.make_file_system(targets=True)


@pytest.fixture
def running(start: Start, file_system: str) -> Running:
    return start(f"--file-system-id={file_system}")


def test_a_claim_is_bound_to_what_the_csi_driver_mounts(
    running: Running, control_plane: ControlPlane, file_system: str
) -> None:
    running.claim("data", running.access_points(), accessModes=["ReadWriteMany"])
    [volume] = running.wait_bound("data")
    [point] = running.efs.access_points(file_system)
    spec = control_plane.request("GET", f"/api/v1/persistentvolumes/{volume.name}")["spec"]
    assert spec["csi"] == {
        "driver": "efs.csi.aws.com",
        "volumeHandle": f"{file_system}::{point['AccessPointId']}",
    }
    assert volume.metadata.annotations[ANN_GID] == str(point["PosixUser"]["Gid"])
    # The UID of kube-system is read with the rights of the manifests.
    tags = {tag["Key"]: tag["Value"] for tag in point["Tags"]}
    system = control_plane.request("GET", "/api/v1/namespaces/kube-system")
    assert tags["external-storage/cluster"] == system["metadata"]["uid"]
    running.delete_claims()
    running.wait(lambda: not running.efs.access_points(file_system), "it is deleted")


def test_a_claim_costs_two_calls_of_aws_in_its_life(running: Running, file_system: str) -> None:
    names = [f"data-{number}" for number in range(20)]
    running.claims_at_once(names, running.access_points())
    running.wait_bound(*names)
    running.delete_claims()
    running.wait(lambda: not running.volumes(), "all are deleted")
    assert running.efs.access_points(file_system) == []
    assert running.efs.operations() == {
        "CreateAccessPoint": 20,
        "DeleteAccessPoint": 20,
        "DescribeAccessPoints": 1,  # in the life of the process
    }
    counted = running.program.metric(
        r'efs_provisioner_aws_requests_total\{code="ok",operation="CreateAccessPoint"\}'
    )
    assert counted == 20


def test_many_claims_at_once_have_a_gid_each_also_through_a_kill(
    running: Running, file_system: str
) -> None:
    names = [f"data-{number}" for number in range(60)]
    running.claims_at_once(names, running.access_points())
    running.wait(lambda: len(running.efs.access_points(file_system)) >= 15, "some are made")
    running.program.kill()
    running.program.start()
    volumes = running.wait_bound(*names)
    points = running.efs.access_points(file_system)
    assert len(points) == 60
    gids = {volume.metadata.annotations[ANN_GID] for volume in volumes}
    assert len(gids) == 60
    assert gids == {str(point["PosixUser"]["Gid"]) for point in points}


def test_every_call_that_is_not_permitted_is_told_by_its_action(
    running: Running, file_system: str
) -> None:
    """And goes on by itself once it is."""
    zone = next(iter(running.efs.targets(file_system)))
    storage_class = running.access_points(az=zone, enforceZoneAffinity="true")
    for number, operation in enumerate(
        (
            "DescribeAccessPoints",
            "DescribeMountTargets",
            "DescribeFileSystems",
            "CreateAccessPoint",
        )
    ):
        running.program.kill()
        running.program.start()  # what was learnt of the file system is forgotten
        running.efs.denied = {operation}
        running.claim(f"data-{number}", storage_class)
        event = running.wait_event(f"data-{number}", "ProvisioningFailed")
        assert event.type == "Warning"
        assert f"AWS denies elasticfilesystem:{operation}" in event.message
        running.efs.clear_faults()
        running.wait_bound(f"data-{number}")
    running.efs.denied = {"DeleteAccessPoint"}
    [volume, *_] = running.wait_bound("data-0")
    running.delete_claims("data-0")
    told = running.wait_event(volume.name, "VolumeFailedDelete")
    assert "AWS denies elasticfilesystem:DeleteAccessPoint" in told.message
    running.efs.clear_faults()
    running.wait(lambda: running.get_volume(volume.name) is None, "the volume is gone")


def test_throttled_at_every_call_it_is_slow_and_loses_nothing(
    running: Running, file_system: str
) -> None:
    every = ("CreateAccessPoint", "DeleteAccessPoint", "DescribeAccessPoints")
    running.efs.throttled.update(dict.fromkeys(every, 2))
    running.claim("data", running.access_points())
    event = running.wait_event("data", "ProvisioningFailed")
    assert "AWS throttles elasticfilesystem:DescribeAccessPoints" in event.message
    [volume] = running.wait_bound("data")
    running.delete_claims()
    running.wait(lambda: running.get_volume(volume.name) is None, "the volume is gone")
    assert running.efs.access_points(file_system) == []
    assert not any(running.efs.throttled.values())


def test_a_claim_deleted_while_nobody_knows_the_answer_leaves_nothing(
    running: Running, file_system: str
) -> None:
    running.efs.lost["CreateAccessPoint"] = 1
    running.claim("data", running.access_points("-lost"))
    running.wait(lambda: running.efs.access_points(file_system), "it is made, and nobody told")
    running.program.kill()
    running.delete_claims()
    running.program.start()
    running.wait(lambda: not running.claims() and not running.volumes(), "the claim is gone")
    running.wait(lambda: not running.efs.access_points(file_system), "the access point is gone")


def test_a_claim_that_was_refused_can_be_changed_and_can_go_after_a_restart(
    running: Running, file_system: str
) -> None:
    """What it was begun with is written on it: it must not be held to that for ever."""
    by_label = running.access_points("-label", subPathPattern="${.PVC.labels.team}")
    elsewhere = running.access_points("-elsewhere", fileSystemId="fs-0123456789abcdef0")
    names = {"labelled": by_label, "goes": by_label, "moved": elsewhere}
    for name, storage_class in names.items():
        running.claim(name, storage_class)
    for name in names:
        running.wait_event(name, "ProvisioningFailed")
    running.program.kill()
    running.program.start()
    running.delete_claims("goes")
    running.wait(lambda: len(running.claims()) == 2, "the deleted claim is gone")
    labels = {"metadata": {"labels": {"team": "storage"}}}
    running.api.patch(PersistentVolumeClaim, "labelled", labels, namespace=running.namespace)
    running.api.delete(StorageClass, elsewhere.name, uid=elsewhere.uid)
    running.wait(lambda: not running.classes(elsewhere.name), "the class is gone")
    running.access_points("-elsewhere", fileSystemId=file_system)
    running.wait_bound("labelled", "moved")
    assert len(running.efs.access_points(file_system)) == 2


def test_an_access_point_is_not_forgotten_when_a_refusal_follows_a_lost_answer(
    running: Running, file_system: str
) -> None:
    running.efs.lost["CreateAccessPoint"] = 1
    running.claim("data", running.access_points())
    running.wait(lambda: running.efs.access_points(file_system), "it is made, and nobody told")
    running.efs.denied.add("CreateAccessPoint")
    running.wait(
        lambda: any("denies" in event.message for event in running.events("data")),
        "an event tells of the refusal",
    )
    running.delete_claims()
    running.efs.clear_faults()
    running.wait(lambda: not running.claims() and not running.volumes(), "the claim is gone")
    running.wait(lambda: not running.efs.access_points(file_system), "the access point is gone")


def test_a_deleted_class_blocks_no_deletion(
    running: Running, control_plane: ControlPlane, file_system: str
) -> None:
    storage_class = running.access_points()
    running.claim("data", storage_class)
    [volume] = running.wait_bound("data")
    control_plane.kubectl("delete", "storageclass", storage_class.name)
    running.delete_claims()
    running.wait(lambda: running.get_volume(volume.name) is None, "the volume is gone")
    assert running.efs.access_points(file_system) == []


def test_a_one_zone_volume_says_which_nodes_reach_it(start: Start, efs: FaultyEfs) -> None:
    running = start(f"--file-system-id={efs.make_file_system(zone='us-east-1b')}")
    running.claim("data", running.access_points(enforceZoneAffinity="true"))
    [volume] = running.wait_bound("data")
    affinity = volume.spec.node_affinity
    assert affinity is not None
    assert affinity.required is not None
    [term] = affinity.required.node_selector_terms
    assert term.match_expressions[0].values == ("us-east-1b",)


def test_the_iam_policy_has_exactly_the_actions_that_are_called(
    running: Running, file_system: str
) -> None:
    zone = next(iter(running.efs.targets(file_system)))
    running.claim("data", running.access_points(az=zone, enforceZoneAffinity="true"))
    [volume] = running.wait_bound("data")
    running.delete_claims()
    running.wait(lambda: running.get_volume(volume.name) is None, "the volume is gone")
    called = {call.operation for call in running.efs.calls}
    # CreateAccessPoint with tags is judged as that and as TagResource.
    wanted = {f"elasticfilesystem:{operation}" for operation in (*called, "TagResource")}
    policy = json.loads((DEPLOY / "iam-policy.json").read_text())
    allowed: set[str] = set()
    for statement in policy["Statement"]:
        actions = statement["Action"]
        allowed |= {actions} if isinstance(actions, str) else set(actions)
    assert allowed == wanted


def test_a_provisioner_named_as_the_csi_driver_does_not_start(
    running: Running, file_system: str
) -> None:
    code, text = running.program.refuses("--provisioner-name=efs.csi.aws.com")
    assert code == 2
    assert "--provisioner-name" in text
    assert "CSI driver's own name" in text
