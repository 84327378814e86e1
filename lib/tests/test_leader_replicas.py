"""Two replicas of a provisioner on the real control plane: one works, the other one waits."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

from external_storage import AssetRecords, Lease, PersistentVolume
from external_storage.kube.client import Client
from external_storage.kube.types import LeaseObject
from external_storage.testing import ControlPlane, FaultProxy

Until = Callable[..., Any]

READS = {"get", "list", "watch"}
OWNER = {"owns_assets": True, "reconcile_interval_s": 0.1}


@dataclass
class Replica:
    """A provisioner of the rig's name with a proxy of its own."""

    rig: Any
    proxy: FaultProxy
    provisioner: Any = None

    def start(self, declare: Mapping[str, Any] | None = None, **settings: str) -> Replica:
        self.provisioner = self.rig.start(
            declare=declare,
            leader_elect="true",
            leader_elect_lease_duration="2",
            leader_elect_renew_deadline="1.5",
            leader_elect_retry_period="0.2",
            leader_elect_resource_namespace=self.rig.namespace,
            **settings,
        )
        return self

    def stop(self) -> None:
        self.rig.manager.stop()

    def part(self, name: str) -> Any:
        """A part of its manager."""
        found = [part for part in self.rig.manager._parts if part.name == name]
        return found[0].start.__self__ if found else None

    @property
    def lease(self) -> Lease:
        lease: Lease = self.part("lease")
        return lease

    def writes(self) -> list[tuple[str, str]]:
        """All that it has tried to change, except by its tries for the lease."""
        return [
            (r.verb, r.resource)
            for r in self.proxy.requests
            if r.verb not in READS and r.resource != "leases"
        ]

    def lists(self) -> int:
        return sum(r.verb == "list" for r in self.proxy.requests)

    def cut_off(self) -> None:
        """From now on nothing that it does about the lease succeeds."""
        self.proxy.on(None, "leases", times=None).fail(500)


Pair = tuple[Replica, Replica]


@pytest.fixture
def pair(rig: Any, control_plane: ControlPlane) -> Iterator[Pair]:
    """Two that share back end and name; not started."""
    with ExitStack() as stack:
        made = []
        for _ in range(2):
            proxy = stack.enter_context(FaultProxy(control_plane))
            plane = SimpleNamespace(kubeconfig=proxy.kubeconfig())
            own = stack.enter_context(ExitStack())
            made.append(Replica(replace(rig, plane=plane, stack=own), proxy))
        yield made[0], made[1]


def led(replica: Replica, until: Until) -> Replica:
    """Wait until it leads."""
    until(replica.lease.is_held, "it leads")
    return replica


def synced(replica: Replica, until: Until) -> Replica:
    until(lambda: replica.rig.controller().syncing() is None, "it has synced")
    return replica


def test_a_standby_has_warm_caches_and_does_nothing(pair: Pair, rig: Any, until: Until) -> None:
    """Until the leader stops: then it takes over what is left, without another look at it all."""
    leader = led(pair[0].start(), until)
    standby = synced(pair[1].start(), until)
    storage_class = rig.storage_class()
    for name in ("a", "b", "c"):
        rig.claim(name, storage_class)
    volumes = {name: rig.bound(name).name for name in ("a", "b", "c")}
    rig.delete_claim("a")
    until(lambda: leader.provisioner.deleted == [volumes["a"]], "the leader deletes")
    volumes_seen = standby.rig.controller()._volumes.lister
    until(lambda: {v.name for v in volumes_seen.all()} == {volumes["b"], volumes["c"]}, "seen")
    assert standby.writes() == []
    assert standby.provisioner.requests == standby.provisioner.deleted == []
    assert standby.provisioner.reconciled == []
    # Nor does it gather what would grow for as long as it waits.
    assert [len(queue._entries) for queue in standby.rig.controller()._queues] == [0, 0, 0]
    lists = standby.lists()
    leader.stop()
    rig.claim("d", storage_class)
    rig.delete_claim("b")
    rig.bound("d")
    until(lambda: standby.provisioner.deleted == [volumes["b"]], "it deletes what the other made")
    assert standby.provisioner.provisioned == ["d"]
    assert standby.lists() == lists
    until(lambda: standby.provisioner.reconciled, "it reconciles")


def test_what_came_while_nobody_led_is_worked_at_once(pair: Pair, rig: Any, until: Until) -> None:
    leader = led(pair[0].start(), until)
    rig.claim("old", rig.storage_class())
    old = rig.bound("old").name
    standby = synced(pair[1].start(), until)
    leader.rig.manager.stop()
    until(standby.lease.is_held, "the second leads")
    standby.cut_off()
    until(lambda: not standby.lease.is_held(), "nobody leads")
    rig.claim("new", rig.storage_class("2"))
    rig.delete_claim("old")
    seen = standby.rig.controller()._claims.lister
    until(lambda: [claim.name for claim in seen.all()] == ["new"], "it sees both")
    assert standby.provisioner.provisioned == standby.provisioner.deleted == []
    standby.proxy.clear()
    rig.bound("new")
    until(lambda: standby.provisioner.deleted == [old], "the deletion too")


def test_a_lost_lease_stops_the_writes_before_another_replica_starts(
    pair: Pair, rig: Any, until: Until
) -> None:
    """Also those of a call that was going on; once the lease is back, so is the work."""
    first = led(pair[0].start(failed_provision_threshold="1"), until)
    slow, go_on = threading.Event(), threading.Event()

    def hold(_request: object) -> None:
        slow.set()
        go_on.wait(60)

    first.provisioner.on_provision = hold
    second = synced(pair[1].start(), until)
    rig.claim("data", rig.storage_class())
    assert slow.wait(60)
    first.part("events").flush(10)
    before = first.writes()
    first.cut_off()
    led(second, until)
    assert not first.lease.is_held()
    go_on.set()
    volume = rig.bound("data")
    assert second.provisioner.provisioned == ["data"]
    queue = first.rig.controller()._claim_queue
    until(lambda: not queue.working(), "the call of the first has ended")
    first.part("events").flush(10)
    assert first.writes() == before
    assert not rig.events("data", "ProvisioningFailed")
    first.provisioner.on_provision = lambda _: None
    first.proxy.clear()
    second.stop()
    rig.claim("more", rig.storage_class("2"))
    rig.bound("more")
    assert first.provisioner.provisioned == ["data", "more"]
    store = first.rig.controller()._store
    until(lambda: not store.unsaved_count(), "it knows that the volume has been saved by the other")
    assert {v.name for v in rig.volumes()} >= {volume.name}
    assert len(rig.volumes()) == 2


def test_who_owns_assets_looks_after_them_as_a_standby_and_takes_no_new_claim(
    pair: Pair, rig: Any, until: Until
) -> None:
    def may_delete(self: Any, volume: PersistentVolume) -> bool:
        return volume.name in [request.volume_name for request in self.requests]

    for replica in pair:
        replica.rig.methods["may_delete"] = may_delete
    owner = led(pair[0].start(OWNER), until)
    storage_class = rig.storage_class()
    rig.claim("a", storage_class)
    volume = rig.bound("a").name
    other = synced(pair[1].start(OWNER), until)
    until(lambda: other.provisioner.reconciled, "a standby reconciles")
    owner.cut_off()
    led(other, until)
    rounds = len(owner.provisioner.reconciled)
    rig.claim("b", storage_class)
    rig.bound("b")
    rig.delete_claim("a")
    until(lambda: owner.provisioner.deleted == [volume], "the owner deletes its own")
    until(lambda: volume not in {v.name for v in rig.volumes()}, "and saves that")
    until(lambda: len(owner.provisioner.reconciled) > rounds + 2, "and reconciles")
    assert (owner.provisioner.provisioned, other.provisioner.provisioned) == (["a"], ["b"])
    assert other.provisioner.deleted == []


def test_a_successor_finds_what_the_dead_leader_had_begun(
    pair: Pair, rig: Any, until: Until
) -> None:
    """With asset records in a place that both reach: written after the standby has started."""
    leader = led(pair[0].start({"keeps_records": True}), until)
    standby = synced(pair[1].start({"keeps_records": True}), until)
    claim = rig.claim("data", "no-such-class")
    name = f"pvc-{claim.uid}"
    AssetRecords(rig.root.parent / "records").begin(name, claim=claim)
    (rig.root / name).mkdir()
    rig.delete_claim("data")
    leader.stop()
    until(lambda: standby.provisioner.discarded == [name], "it is discarded")
    assert standby.provisioner.assets() == []
    assert leader.provisioner.discarded == []


def test_work_that_was_cut_off_leaves_the_lease_to_run_out(
    pair: Pair, rig: Any, until: Until, api: Client
) -> None:
    """It may go on until the process ends; a release would let another one begin."""
    leader = led(pair[0].start(shutdown_timeout="0.5"), until)
    slow, go_on = threading.Event(), threading.Event()

    def hold(_request: object) -> None:
        slow.set()
        go_on.wait(60)

    leader.provisioner.on_provision = hold
    rig.claim("data", rig.storage_class())
    assert slow.wait(60)
    assert not leader.rig.manager.stop()
    name = leader.lease.key.partition("/")[2]
    assert api.get(LeaseObject, name, namespace=rig.namespace).spec.holder_identity
    go_on.set()


def test_throttled_work_does_not_starve_the_lease(pair: Pair, rig: Any, until: Until) -> None:
    """One request in a hundred seconds: the first list is all that the work may send."""
    replica = led(pair[0].start(kube_api_qps="0.01", kube_api_burst="1"), until)
    replica.proxy.wait_for(lambda r: (r.verb, r.resource) == ("patch", "leases"), count=3)
    assert replica.lease.is_held()
    assert sum(r.resource != "leases" for r in replica.proxy.requests) <= 1
    # Its informers wait for their turn, and would hold up the end.
    next(p for p in replica.rig.manager._parts if p.name == "throttle").stop(0.0)


def test_without_leader_election_there_is_no_lease_request(
    pair: Pair, rig: Any, until: Until
) -> None:
    replica = pair[0]
    replica.provisioner = replica.rig.start(leader_elect="false")
    rig.claim("data", rig.storage_class())
    rig.bound("data")
    assert replica.part("lease") is None
    assert "leases" not in {request.resource for request in replica.proxy.requests}


def test_who_leads_shows_in_metrics_and_in_healthz(
    pair: Pair, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader = led(pair[0].start(http_endpoint="127.0.0.1:0"), until)
    standby = synced(pair[1].start(http_endpoint="127.0.0.1:0"), until)
    until(lambda: standby.lease.holder() == leader.lease.identity, "it knows who leads")
    assert "external_storage_leader 1.0" in ask(leader, "/metrics")[1].splitlines()
    assert "external_storage_leader 0.0" in ask(standby, "/metrics")[1].splitlines()
    assert "[+] leader: ok" in ask(leader, "/healthz?verbose")[1]
    status, text = ask(standby, "/healthz?verbose")
    assert status == 200
    assert f"is held by {leader.lease.identity}" in text
    monkeypatch.setattr(leader.lease, "_tries", threading.Thread())
    status, text = ask(leader, "/healthz")
    assert status == 503
    assert "nobody looks after the lease" in text


def ask(replica: Replica, path: str) -> tuple[int, str]:
    server = replica.part("health")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()
