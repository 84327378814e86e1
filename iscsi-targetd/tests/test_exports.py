"""Exports kept as volumes say: on a targetd over its model, and on our helper over models."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from tests.backend_suite import CHAP, ONE, THREE, TWO, Bench
from tests.fake_host import GROUP, IQN, FakeHost
from tests.targetd_server import HangUp, Model, TargetdServer
from tests.test_targetd_backend import backend_of

from external_storage import PersistentVolume
from external_storage.metrics import Metrics
from external_storage.testing.builders import Clock
from iscsi_targetd_provisioner.backend import Access, Backend
from iscsi_targetd_provisioner.chap import Chap
from iscsi_targetd_provisioner.credentials import Credentials
from iscsi_targetd_provisioner.exports import ANN_INITIATORS, FROM_NODES, ExportKeeper
from iscsi_targetd_provisioner.fleet import ANN_POOL, ANN_SERVER, Fleet
from iscsi_targetd_provisioner.initiators import NodeInitiators
from iscsi_targetd_provisioner.luns import KnownLuns
from iscsi_targetd_provisioner.servers import Server

DAEMON, HOST = "daemon", "host"
LATER_S = 600.0


class Nodes:
    """Of ``NodeInitiators`` what the keeper asks."""

    def __init__(self, *names: str) -> None:
        self.there = set(names)
        self.refused: frozenset[str] = frozenset()

    def names(self) -> frozenset[str]:
        return frozenset(self.there)

    def note_refused(self, names: frozenset[str]) -> None:
        self.refused |= names

    def report(self) -> int:
        return 0


class Secrets:
    """Of the API server the Secrets, and how often they are read."""

    def __init__(self, chap: Chap | None = None) -> None:
        self.chap = chap
        self.reads = 0

    def of_volume(self, _volume: PersistentVolume) -> Chap | None:
        self.reads += 1
        return self.chap

    def forget(self) -> None:
        pass


class Events(list[tuple[str, str, str]]):
    def warning(self, about: Any, reason: str, text: str) -> None:
        self.append((about.name, reason, text))

    normal = warning


class Keeping:
    """A keeper of volumes on one server, and what it is told of the cluster."""

    def __init__(self, server: str, backend: Backend, pool: str) -> None:
        self.bench = Bench(backend, pool)
        self.nodes = Nodes(ONE, TWO)
        self.secrets = Secrets()
        self.events = Events()
        self.clock = Clock()
        self.server = server
        place = Server(name=server, backend=backend, iqn="", portals=())
        self.keeper = ExportKeeper(
            fleet=Fleet({server: place}, ""),
            nodes=cast(NodeInitiators, self.nodes),
            credentials=cast(Credentials, self.secrets),
            events=cast(Any, self.events),
            timeout_s=60.0,
            withdraw_after_s=LATER_S,
            clock=self.clock,
        )
        self.luns = KnownLuns()
        self.volumes: list[PersistentVolume] = []

    def make(self, *names: str, pool: str = "") -> None:
        for name in names:
            bench = self.bench
            bench.backend.create(bench.pool, name, 8 << 20, deadline=bench.deadline)
            access = Access(
                initiators=self.nodes.names(),
                portals=bench.portals,
                avoid=self.luns.of_others(self.server, name),
            )
            target = bench.backend.export(bench.pool, name, access, deadline=bench.deadline)
            source = {
                "targetPortal": "127.0.0.1:3260",
                "iqn": target.iqn,
                "lun": target.lun,
            }
            notes = {
                ANN_SERVER: self.server,
                ANN_POOL: pool or bench.pool,
                ANN_INITIATORS: FROM_NODES,
            }
            body = {
                "metadata": {"name": name, "annotations": notes},
                "spec": {"iscsi": source},
                "status": {"phase": "Bound"},
            }
            volume = msgspec.convert(body, PersistentVolume)
            self.luns.changed(None, volume)
            self.volumes.append(volume)

    def remove(self, name: str) -> None:
        [volume] = [volume for volume in self.volumes if volume.name == name]
        self.volumes.remove(volume)
        self.luns.changed(volume, None)
        self.bench.remove(name)

    def reconcile(self) -> None:
        self.keeper.reconcile(self.volumes)

    def says(self) -> dict[str, int]:
        return {v.name: v.spec.iscsi.lun for v in self.volumes if v.spec.iscsi is not None}


@pytest.fixture
def daemon(targetd: TargetdServer) -> Keeping:
    return Keeping(DAEMON, backend_of(targetd), "vg-targetd")


@pytest.fixture
def lio(host: FakeHost) -> Keeping:
    return Keeping(HOST, host.backend(), GROUP)


def luns(model: Model) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for (_, lun), (_, name) in model.exports.items():
        found.setdefault(name, set()).add(lun)
    return found


# -- the LUN that nodes know


def test_a_lost_export_is_made_again_under_the_same_lun(
    daemon: Keeping, targetd: TargetdServer
) -> None:
    daemon.make("pvc-1", "pvc-2", "pvc-3")
    daemon.remove("pvc-1")
    assert daemon.says() == {"pvc-2": 1, "pvc-3": 2}
    targetd.model.exports.clear()
    daemon.reconcile()
    assert luns(targetd.model) == {"pvc-2": {1}, "pvc-3": {2}}
    assert daemon.events == []


def test_a_lun_of_a_volume_whose_export_is_lost_is_given_to_no_other(
    daemon: Keeping, targetd: TargetdServer
) -> None:
    daemon.make("pvc-1", "pvc-2")
    targetd.model.exports.clear()
    daemon.make("pvc-3")
    assert daemon.says()["pvc-3"] == 2
    daemon.reconcile()
    assert luns(targetd.model) == {"pvc-1": {0}, "pvc-2": {1}, "pvc-3": {2}}


def test_a_lun_that_has_become_another_volumes_is_left_to_it(
    daemon: Keeping, targetd: TargetdServer
) -> None:
    daemon.make("pvc-1")
    targetd.model.exports.clear()
    daemon.luns = KnownLuns()
    daemon.make("pvc-2")
    before = dict(targetd.model.exports)
    daemon.reconcile()
    assert targetd.model.exports == before
    [(name, reason, text)] = daemon.events
    assert (name, reason) == ("pvc-1", "ExportFailed")
    assert "LUN 0, by which nodes know volume pvc-1, is another volume's now" in text


def test_a_volume_under_another_lun_than_it_says_is_left_alone(
    daemon: Keeping, targetd: TargetdServer
) -> None:
    daemon.make("pvc-1")
    targetd.model.exports = {(ONE, 7): ("vg-targetd", "pvc-1")}
    daemon.reconcile()
    assert set(targetd.model.exports) == {(ONE, 7)}
    assert "is exported under LUN 7, and says 0" in daemon.events[0][2]


def test_a_volume_in_use_keeps_its_exports_when_another_is_in_the_way(
    daemon: Keeping, targetd: TargetdServer
) -> None:
    """A node that comes finds its LUN taken: no reason to take the disk from the others."""
    daemon.make("pvc-1")
    bench = daemon.bench
    bench.backend.create(bench.pool, "pvc-x", 8 << 20, deadline=bench.deadline)
    targetd.model.exports[(THREE, 0)] = ("vg-targetd", "pvc-x")
    daemon.nodes.there.add(THREE)
    daemon.reconcile()
    assert {(ONE, 0), (TWO, 0)} <= set(targetd.model.exports)
    assert targetd.model.exports[(THREE, 0)] == ("vg-targetd", "pvc-x")


# -- nodes that go and come


def test_on_a_targetd_nobody_loses_access_while_the_volume_is_there(
    daemon: Keeping, targetd: TargetdServer
) -> None:
    """It does not tell who is logged in: any of them may have the disk mounted."""
    daemon.make("pvc-1")
    daemon.nodes.there = {TWO, THREE}
    for _ in range(3):
        daemon.reconcile()
        daemon.clock.advance(LATER_S)
    assert {who for who, _ in targetd.model.exports} == {ONE, TWO, THREE}
    daemon.remove("pvc-1")
    assert targetd.model.exports == {}


def test_a_node_that_is_gone_for_long_loses_access(lio: Keeping, host: FakeHost) -> None:
    lio.make("pvc-1")
    iqn = f"{IQN}:pvc-1"
    lio.nodes.there = {TWO}
    lio.reconcile()
    lio.clock.advance(LATER_S - 1)
    lio.reconcile()
    assert host.rtslib.initiators(iqn) == {ONE, TWO}
    # It is back for a moment: it is counted anew.
    lio.nodes.there = {ONE, TWO}
    lio.reconcile()
    lio.nodes.there = {TWO}
    lio.clock.advance(2)
    lio.reconcile()
    assert host.rtslib.initiators(iqn) == {ONE, TWO}
    host.rtslib.logged_in = {(iqn, ONE)}
    lio.clock.advance(LATER_S)
    lio.reconcile()
    assert host.rtslib.initiators(iqn) == {ONE, TWO}, "it is logged in"
    host.rtslib.logged_in.clear()
    lio.reconcile()
    lio.clock.advance(LATER_S)
    lio.reconcile()
    assert host.rtslib.initiators(iqn) == {TWO}


def test_a_node_that_comes_gets_the_volumes_that_are_there(lio: Keeping, host: FakeHost) -> None:
    lio.make("pvc-1", "pvc-2")
    lio.nodes.there.add(THREE)
    lio.reconcile()
    for name in ("pvc-1", "pvc-2"):
        assert host.rtslib.initiators(f"{IQN}:{name}") == {ONE, TWO, THREE}


def test_without_any_node_the_exports_stay(lio: Keeping, host: FakeHost) -> None:
    lio.make("pvc-1")
    lio.nodes.there = set()
    lio.clock.advance(LATER_S)
    lio.reconcile()
    assert host.rtslib.initiators(f"{IQN}:pvc-1") == {ONE, TWO}
    assert "no initiator is known" in lio.events[0][2]


def test_a_node_whose_name_is_refused_is_told_and_not_tried_for_ever(
    lio: Keeping, host: FakeHost
) -> None:
    lio.make("pvc-1")
    bad = "iqn.2026-01.com"
    lio.nodes.there |= {bad, THREE}
    lio.reconcile()
    assert lio.nodes.refused == {bad}
    assert host.rtslib.initiators(f"{IQN}:pvc-1") == {ONE, TWO, THREE}
    calls = len(host.rtslib.calls)
    lio.reconcile()
    assert len(host.rtslib.calls) == calls


# -- what cannot be compared


def test_a_volume_of_a_pool_that_is_not_configured_is_not_mended(
    lio: Keeping, host: FakeHost
) -> None:
    lio.make("pvc-1", pool="vg-system")
    calls = len(host.rtslib.calls)
    lio.reconcile()
    assert len(host.rtslib.calls) == calls
    assert "pool vg-system is not configured" in lio.events[0][2]


def test_a_host_that_goes_amid_the_comparison_is_asked_once(
    daemon: Keeping, targetd: TargetdServer
) -> None:
    names = [f"pvc-{number}" for number in range(5)]
    daemon.make(*names)
    daemon.nodes.there.add(THREE)
    asked = []

    def fault(method: str, do: Callable[[], Any]) -> Any:
        if method == "export_create":
            asked.append(method)
            raise HangUp
        return do()

    metrics = Metrics()
    daemon.keeper.export_metrics(metrics)
    with targetd.faulty(fault):
        daemon.reconcile()
    assert len(asked) == 1
    assert metrics.registry.get_sample_value("iscsi_targetd_exports_failed") == 5
    daemon.reconcile()
    assert metrics.registry.get_sample_value("iscsi_targetd_exports_failed") == 0


def test_a_secret_of_many_volumes_is_read_once_a_round() -> None:
    class Client:
        reads = 0

        def find(self, *_args: object, **_kwargs: object) -> Any:
            self.reads += 1
            keys = ("node.session.auth.username", "node.session.auth.password")
            return SimpleNamespace(data=dict.fromkeys(keys, "c2VjcmV0IG9mIHRlc3Q="))

    body = {
        "metadata": {"name": "pvc-1"},
        "spec": {
            "iscsi": {
                "targetPortal": "a",
                "iqn": "b",
                "lun": 0,
                "chapAuthSession": True,
                "secretRef": {"name": "chap", "namespace": "default"},
            }
        },
    }
    volume = msgspec.convert(body, PersistentVolume)
    client = Client()
    credentials = Credentials(client=cast(Any, client), namespace="n", file=cast(Any, None))
    for _ in range(3):
        assert credentials.of_volume(volume) is not None
    assert client.reads == 1
    credentials.forget()
    credentials.of_volume(volume)
    assert client.reads == 2


# -- credentials that are replaced


def test_a_replaced_secret_is_set_once_and_later_for_who_is_logged_in(
    lio: Keeping, host: FakeHost
) -> None:
    lio.secrets.chap = CHAP
    lio.make("pvc-1")
    iqn = f"{IQN}:pvc-1"
    lio.reconcile()
    assert host.rtslib.passwords("pvc-1") == {CHAP.password}
    host.rtslib.logged_in = {(iqn, ONE)}
    lio.secrets.chap = Chap("alice", "another secret")
    for _ in range(2):
        lio.reconcile()
        assert host.rtslib.passwords("pvc-1") == {CHAP.password, "another secret"}
    host.rtslib.logged_in.clear()
    lio.reconcile()
    assert host.rtslib.passwords("pvc-1") == {"another secret"}
