"""A whole life on real parts: the program on the control plane, LIO and open-iscsi in a guest."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.storage_host import INITIATOR, StorageHost

from external_storage.kube.client import Client
from external_storage.kube.types import Node, PersistentVolume, PersistentVolumeClaim, Secret
from external_storage.testing import ControlPlane, Program, ProgramProcess, Sandbox
from iscsi_targetd_provisioner.initiators import ANNOTATION

# An emulated guest is some ten times slower than its host, and the host may be busy.
pytestmark = pytest.mark.timeout(900)
LIMIT_S = 400.0

PASSWORD = "the real secret of the test"
OTHER = "another secret of the test"
USER = "node.session.auth.username"
SECRET = "node.session.auth.password"


@pytest.fixture
def bench(
    storage_host: StorageHost,
    control_plane: ControlPlane,
    client: Client,
    namespace: str,
    tmp_path: Path,
) -> Iterator[Bench]:
    made = Bench(storage_host, control_plane, client, namespace, tmp_path)
    try:
        made.program.start()
        yield made
    finally:
        made.sandbox.delete_claims()
        if made.program.running:
            made.program.kill()
        made.sandbox.clean_up()
        storage_host.clear()
        sys.stderr.write(made.program.tail(200))


class Bench:
    """The program, with the guest as its only storage host and as the cluster's only node."""

    def __init__(
        self, host: StorageHost, plane: ControlPlane, client: Client, namespace: str, path: Path
    ) -> None:
        self.host = host
        self.client = client
        self.namespace = namespace
        self.name = f"example.com/guest-{uuid.uuid4().hex[:8]}"
        self.sandbox = Sandbox(
            api=client, namespace=namespace, provisioner=self.name, limit_s=LIMIT_S
        )
        self.node = self.sandbox.make(
            Node,
            {"metadata": {"name": f"{namespace}-node", "annotations": {ANNOTATION: INITIATOR}}},
        )
        self.servers = path / "servers.yaml"
        self.servers.write_text(json.dumps({"servers": {"storage": host.config()}}))
        self.kubeconfig = plane.kubeconfig
        self.log = path / "log"
        self.program = self.another(self.name, self.log)

    def another(self, name: str, log: Path) -> ProgramProcess:
        """The program under this provisioner name, not started."""
        argv = (sys.executable, "-m", "iscsi_targetd_provisioner")
        flags = (f"--servers-file={self.servers}", "--reconcile-interval=2s", "--withdraw-after=2s")
        return ProgramProcess(
            Program(argv=(*argv, *flags), env={"POD_NAMESPACE": self.namespace}),
            name=name,
            kubeconfig=self.kubeconfig,
            log=log,
        )

    def secret(self, password: str, **more: str) -> None:
        data = {USER: "alice", SECRET: password, **more}
        body = {"metadata": {"name": "chap"}, "type": "kubernetes.io/iscsi-chap"}
        self.client.create(Secret, {**body, "stringData": data}, namespace=self.namespace)

    def iqn(self, volume: PersistentVolume) -> str:
        assert volume.spec.iscsi is not None
        return volume.spec.iscsi.iqn

    def record(self, password: str) -> list[tuple[str, str]]:
        return [("node.session.auth.authmethod", "CHAP"), (USER, "alice"), (SECRET, password)]


SMALL = {"pool": "vg-iscsi", "fsType": "ext4"}
CHAP_CLASS = {
    "pool": "vg-iscsi/thin",
    "chapAuthSession": "true",
    "chapSecretName": "chap",
    "fsType": "ext4",
}


def test_a_claim_lives_with_chap_grows_while_it_is_used_and_leaves_nothing(bench: Bench) -> None:
    host, run = bench.host, bench.host.guest.run
    bench.secret(PASSWORD)
    storage_class = bench.sandbox.storage_class(parameters=CHAP_CLASS, allowVolumeExpansion=True)
    bench.sandbox.claim("data", storage_class, resources={"requests": {"storage": "64Mi"}})
    [volume] = bench.sandbox.wait_bound("data")
    iqn = bench.iqn(volume)
    assert host.volumes() == {volume.name}
    assert iqn in host.saved()
    # Who does not know the secret, or is another, stays outside.
    assert host.log_in(iqn) == 24
    assert host.log_in(iqn, bench.record("a wrong secret")) == 24
    stranger = host.pretend_to_be("iqn.2026-01.com.example:stranger")
    assert host.log_in(iqn, bench.record(PASSWORD), interface=stranger) == 24
    assert host.log_in(iqn, bench.record(PASSWORD)) == 0
    disk = host.disk(iqn)
    run(f"mkfs.ext4 -q {disk} && mount {disk} /mnt && echo precious >/mnt/data && sync")
    # It grows while it is mounted.
    patch = {"spec": {"resources": {"requests": {"storage": "128Mi"}}}}
    bench.client.patch(PersistentVolumeClaim, "data", patch, namespace=bench.namespace)
    bench.sandbox.wait_event("data", "FileSystemResizeRequired")
    assert "iscsiadm" in bench.sandbox.wait_event("data", "NodeStep").message
    # No node-agent runs here: these are the two commands of the event.
    run(["iscsiadm", "-m", "node", "-T", iqn, "-R"])
    run(["resize2fs", disk])
    blocks, size = run(["stat", "-f", "-c", "%b %S", "/mnt"]).split()
    assert int(blocks) * int(size) > 100 << 20
    assert int(run(["blockdev", "--getsize64", disk])) == 128 << 20
    assert run("cat /mnt/data").strip() == "precious"
    # While a node is logged in, nothing is taken away from it.
    bench.sandbox.delete_claims("data")
    bench.sandbox.wait_event(volume.name, "VolumeInUse")
    assert run("cat /mnt/data").strip() == "precious"
    run("umount /mnt")
    host.log_out(iqn)
    bench.sandbox.wait(lambda: bench.sandbox.get_volume(volume.name) is None, "the volume is gone")
    assert (host.volumes(), host.running()) == (set(), set())
    assert volume.name not in host.saved()
    # The secret has gone through SSH to the host, and nowhere else.
    assert PASSWORD not in bench.log.read_text()
    assert PASSWORD not in bench.sandbox.describe()
    assert PASSWORD not in bench.program.get("/metrics")[1]


def test_a_replaced_secret_and_a_new_node_reach_volumes_that_are_there(bench: Bench) -> None:
    host = bench.host
    bench.secret(PASSWORD)
    bench.sandbox.claim("data", bench.sandbox.storage_class(parameters=CHAP_CLASS))
    [volume] = bench.sandbox.wait_bound("data")
    iqn = bench.iqn(volume)
    assert host.log_in(iqn, bench.record(PASSWORD)) == 0
    host.log_out(iqn)
    patch = {"stringData": {SECRET: OTHER}}
    bench.client.patch(Secret, "chap", patch, namespace=bench.namespace)
    bench.sandbox.wait(lambda: OTHER in host.saved(), "the new secret is on the host")
    assert host.log_in(iqn, bench.record(PASSWORD)) == 24
    assert host.log_in(iqn, bench.record(OTHER)) == 0
    host.log_out(iqn)
    late = "iqn.2026-01.com.example:late"
    notes = {"annotations": {ANNOTATION: late}}
    made = bench.client.create(Node, {"metadata": {"name": f"{bench.namespace}-late", **notes}})
    bench.sandbox.wait(lambda: late in host.saved(), "the new node may log in")
    bench.client.delete(Node, made.name, uid=made.uid)
    bench.sandbox.wait(lambda: late not in host.saved(), "the node that is gone may not")


def test_what_is_exported_is_there_again_after_a_reboot(bench: Bench) -> None:
    host = bench.host
    bench.sandbox.claim("data", bench.sandbox.storage_class(parameters={"fsType": "ext4"}))
    [volume] = bench.sandbox.wait_bound("data")
    iqn = bench.iqn(volume)
    # Alone: a provisioner that runs exports again what it misses.
    bench.program.stop()
    host.guest.power_cut()
    host.guest.start_again()
    host.guest.run("vgchange -qay", timeout_s=120)
    host.guest.run(["targetctl", "restore"])
    assert host.running() == {iqn}
    assert host.log_in(iqn) == 0
    host.log_out(iqn)
    bench.program.start()
    bench.sandbox.delete_claims()
    bench.sandbox.wait(lambda: not host.volumes(), "the volume is gone")


def test_two_provisioners_with_claims_at_once_on_one_host_do_not_collide(
    bench: Bench, tmp_path: Path
) -> None:
    name = f"example.com/second-{uuid.uuid4().hex[:8]}"
    second = bench.another(name, tmp_path / "second.log")
    other = Sandbox(api=bench.client, namespace=bench.namespace, provisioner=name, limit_s=LIMIT_S)
    second.start()
    try:
        ours = bench.sandbox.storage_class(parameters=SMALL)
        theirs = other.storage_class("-second", parameters=SMALL)
        names = [f"claim-{number}" for number in range(8)]
        bench.sandbox.claims_at_once(names[:4], ours)
        other.claims_at_once(names[4:], theirs)
        volumes = bench.sandbox.wait_bound(*names)
        assert len({bench.iqn(volume) for volume in volumes}) == 8
        assert {bench.iqn(volume) for volume in volumes} == bench.host.running()
        assert bench.host.volumes() == {volume.name for volume in volumes}
        bench.sandbox.delete_claims()
        bench.sandbox.wait(lambda: not bench.host.volumes(), "the volumes are gone")
        assert bench.host.running() == set()
    finally:
        second.kill()
        other.clean_up()
