"""The program on the control plane and a targetd over its model: many claims, commands, secrets."""

from __future__ import annotations

import functools
import json
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.targetd_server import MIB, PASSWORD, USER, Model, TargetdError, TargetdServer

from external_storage.kube.client import Client
from external_storage.kube.types import PersistentVolume, Secret
from external_storage.testing import ControlPlane, Program, ProgramProcess, Sandbox
from iscsi_targetd_provisioner.__main__ import main
from iscsi_targetd_provisioner.exports import ANN_INITIATORS

INITIATORS = "iqn.2026-01.com.example:one,iqn.2026-01.com.example:two"
CLASS = {"targetPortal": "10.0.0.5:3260", "initiators": INITIATORS, "fsType": "ext4"}
# Whatever the level that the tests' programs are started with: the last one counts.
DEBUG = (
    "import sys; from iscsi_targetd_provisioner.__main__ import main; "
    "main([*sys.argv[1:], '--log-level=debug'])"
)
IN, OUT = "the secret of the initiators", "the secret of the target"


class Cluster:
    """A targetd, and programs that use it in one namespace."""

    def __init__(self, plane: ControlPlane, client: Client, namespace: str, path: Path) -> None:
        self.plane, self.client, self.namespace, self.path = plane, client, namespace, path
        model = Model(pools={"vg-targetd": 4096 * MIB, "fast/thin": 64 * MIB})
        self.server = TargetdServer(model)
        self.programs: list[ProgramProcess] = []
        self.sandboxes: list[Sandbox] = []

    @property
    def model(self) -> Model:
        return self.server.model

    def servers_file(self) -> Path:
        (self.path / "user").write_text(f"{USER}\n")
        (self.path / "password").write_text(f"{PASSWORD}\n")
        config = {
            "type": "targetd",
            "url": self.server.url,
            "usernameFile": str(self.path / "user"),
            "passwordFile": str(self.path / "password"),
            "iqn": "iqn.2003-01.org.linux-iscsi.storage:targetd",
            "pools": ["vg-targetd"],
        }
        found = self.path / "servers.yaml"
        found.write_text(json.dumps({"servers": {"storage": config}}))
        return found

    def start(self) -> Sandbox:
        """One more program, under a provisioner name of its own."""
        name = f"example.com/targetd-{uuid.uuid4().hex[:8]}"
        argv = (sys.executable, "-c", DEBUG, f"--servers-file={self.servers_file()}")
        program = ProgramProcess(
            Program(argv=(*argv, "--reconcile-interval=1s"), env={"POD_NAMESPACE": self.namespace}),
            name=name,
            kubeconfig=self.plane.kubeconfig,
            log=self.path / f"log-{len(self.programs)}",
        )
        self.programs.append(program)
        program.start()
        made = Sandbox(api=self.client, namespace=self.namespace, provisioner=name)
        self.sandboxes.append(made)
        return made

    def command(self, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
        """One of the program's commands, for people; its exit code, and what it says."""
        flags = [
            f"--servers-file={self.servers_file()}",
            f"--kubeconfig={self.plane.kubeconfig}",
            f"--provisioner-name={self.programs[0].name}",
        ]
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*argv, *flags])
        text = "".join(capsys.readouterr())
        assert PASSWORD not in text
        return int(str(ended.value.code)), text

    def luns(self) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for (_, lun), (_, name) in self.model.exports.items():
            found.setdefault(name, set()).add(lun)
        return found


@pytest.fixture
def cluster(
    control_plane: ControlPlane, client: Client, namespace: str, tmp_path: Path
) -> Iterator[Cluster]:
    made = Cluster(control_plane, client, namespace, tmp_path)
    with made.server:
        yield made
        for program in made.programs:
            if program.running:
                program.kill()
            sys.stderr.write(program.tail(60))
        for sandbox in made.sandboxes:
            sandbox.clean_up()


def said(volume: PersistentVolume) -> int:
    assert volume.spec.iscsi is not None
    return volume.spec.iscsi.lun


def assert_each_has_its_own_lun(cluster: Cluster, volumes: list[PersistentVolume]) -> None:
    luns = cluster.luns()
    assert luns == {volume.name: {said(volume)} for volume in volumes}
    assert len({said(volume) for volume in volumes}) == len(volumes)
    assert len(cluster.model.exports) == 2 * len(volumes)
    assert {name for _, name in cluster.model.volumes} == {volume.name for volume in volumes}


def test_twenty_claims_at_once_have_luns_of_their_own_also_after_the_host_lost_them(
    cluster: Cluster,
) -> None:
    sandbox = cluster.start()
    names = [f"claim-{number}" for number in range(20)]
    sandbox.claims_at_once(names, sandbox.storage_class(parameters=CLASS))
    first, *volumes = sandbox.wait_bound(*names)
    assert_each_has_its_own_lun(cluster, [first, *volumes])
    sandbox.delete_claims(names[0])
    sandbox.wait(lambda: len(cluster.model.volumes) == 19, "the first volume is gone")
    cluster.model.exports.clear()
    sandbox.wait(lambda: len(cluster.model.exports) == 38, "the exports are back")
    assert_each_has_its_own_lun(cluster, volumes)
    sandbox.delete_claims()
    sandbox.wait(lambda: not cluster.model.volumes, "the volumes are gone")
    assert cluster.model.exports == {}


def test_two_programs_with_forty_claims_on_one_targetd_collide_nowhere(cluster: Cluster) -> None:
    """Neither knows of the other; targetd has no lock between looking for a LUN and taking it."""
    sandboxes = [cluster.start(), cluster.start()]
    names = [[f"claim-{which}-{number}" for number in range(20)] for which in range(2)]
    for which, sandbox in enumerate(sandboxes):
        storage_class = sandbox.storage_class(f"-{which}", parameters=CLASS)
        sandbox.claims_at_once(names[which], storage_class)
    volumes = [v for which in range(2) for v in sandboxes[which].wait_bound(*names[which])]
    assert len(volumes) == 40
    assert_each_has_its_own_lun(cluster, volumes)
    for sandbox in sandboxes:
        sandbox.delete_claims()
    sandboxes[0].wait(lambda: not cluster.model.volumes, "the volumes are gone")
    assert cluster.model.exports == {}


def test_the_commands_tell_what_is_left_and_what_is_gone(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    command = functools.partial(cluster.command, capsys)
    sandbox = cluster.start()
    sandbox.claim("data", sandbox.storage_class(parameters=CLASS))
    [volume] = sandbox.wait_bound("data")
    assert volume.metadata.annotations[ANN_INITIATORS] == INITIATORS
    code, text = command("doctor")
    assert (code, "targetd answers" in text, "authentication=1" in text) == (0, True, True)
    assert command("orphans") == (0, "")
    assert command("missing") == (0, "")
    # One more than there should be: told, and removed only when it is named.
    cluster.model.vol_create("vg-targetd", "pvc-left", 8 * MIB)
    code, text = command("orphans")
    assert (code, text.split()) == (1, ["storage", "vg-targetd", "pvc-left", str(8 * MIB)])
    code, text = command("orphans", f"--remove={volume.name}")
    assert code == 2
    assert "is not an orphan: nothing is removed" in text
    code, text = command("orphans", "--remove=pvc-left")
    assert (code, "removed pvc-left" in text) == (0, True)
    assert {name for _, name in cluster.model.volumes} == {volume.name}
    # And one less.
    cluster.programs[0].stop()
    cluster.model.exports.clear()
    assert command("missing") == (1, f"{volume.name}\tnot exported\n")
    volumes = dict(cluster.model.volumes)
    cluster.model.volumes.clear()
    assert command("missing") == (1, f"{volume.name}\tno volume\n")
    cluster.model.volumes = volumes
    cluster.model.poisoned = True
    code, text = command("doctor")
    assert (code, "one of its LUNs is outside its pools" in text) == (1, True)
    cluster.model.poisoned = False
    cluster.programs[0].start()
    sandbox.delete_claims()
    sandbox.wait(lambda: not cluster.model.volumes, "the volume is gone")


def test_secrets_are_told_nowhere_not_even_at_debug_level(cluster: Cluster) -> None:
    keys = ("username", "password", "username_in", "password_in")
    data = dict(zip((f"node.session.auth.{key}" for key in keys), ("a", IN, "b", OUT), strict=True))
    body = {"metadata": {"name": "chap"}, "type": "kubernetes.io/iscsi-chap", "stringData": data}
    cluster.client.create(Secret, body, namespace=cluster.namespace)
    sandbox = cluster.start()
    program = cluster.programs[0]
    refused: list[str] = []

    def fault(method: str, do: Callable[[], Any]) -> Any:
        """Once, with words that have the arguments in them."""
        if method == "initiator_set_auth" and not refused:
            refused.append(method)
            raise TargetdError(-1, f"TypeError: ({IN!r}, {OUT!r}) is not what it should be")
        return do()

    with cluster.server.faulty(fault):
        parameters = {**CLASS, "chapAuthSession": "true", "chapSecretName": "chap"}
        sandbox.claim("data", sandbox.storage_class(parameters=parameters))
        [volume] = sandbox.wait_bound("data")
    assert refused
    assert set(cluster.model.auth.values()) == {("a", IN, "b", OUT)}
    argv = Path(f"/proc/{program.pid}/cmdline").read_bytes().decode()
    shown = {
        "log": program.log.read_text(),
        "events": sandbox.describe(),
        "metrics": program.get("/metrics")[1],
        "health": program.get("/healthz?verbose")[1],
        "argv": argv,
        "volume": repr(volume),
    }
    assert "DEBUG" in shown["log"]
    assert "is not what it should be" in shown["log"]
    assert "is not what it should be" in shown["events"]
    for where, text in shown.items():
        for secret in (IN, OUT, PASSWORD):
            assert secret not in text, where
    sandbox.delete_claims()
    sandbox.wait(lambda: not cluster.model.volumes, "the volume is gone")
