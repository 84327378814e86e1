"""Leases on the real control plane: handed over, run out, and held through what servers do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from external_storage import EventRecorder, Lease
from external_storage.kube.client import Client
from external_storage.kube.errors import NotAllowed, NotFound
from external_storage.kube.types import Event, LeaseObject, PersistentVolume
from external_storage.leader import boot_time
from external_storage.testing import ControlPlane, FaultProxy
from external_storage.testing.builders import Clock
from external_storage.testing.faults import Rule
from external_storage.testing.processes import ProcessGroup
from external_storage.testing.requestlog import ProxiedRequest

Until = Callable[..., Any]

SHORT = {"duration_s": 2.0, "renew_deadline_s": 1.5, "retry_period_s": 0.1}
# What a test waits for can then only come from a release.
LONG = {"duration_s": 600.0, "renew_deadline_s": 500.0, "retry_period_s": 0.1}


class Replica:
    """A lease, and what was called back about it."""

    def __init__(self, client: Client, namespace: str, identity: str, **more: Any) -> None:
        self.calls: list[str] = []
        self.times: list[float] = []
        self.on_call: Callable[[str], object] = more.pop("on_call", lambda _: None)
        self.lease = Lease(
            client,
            name="example.com-test",
            namespace=namespace,
            identity=identity,
            on_acquired=lambda: self._called("acquired"),
            on_lost=lambda: self._called("lost"),
            **{**SHORT, **more},
        )

    def _called(self, what: str) -> None:
        self.calls.append(what)
        self.times.append(boot_time())
        self.on_call(what)


Elect = Callable[..., Replica]


@pytest.fixture
def elect(api: Client, namespace: str) -> Iterator[Elect]:
    """Makes and starts a replica."""
    with ExitStack() as stack:

        def make(identity: str, client: Client | None = None, **more: Any) -> Replica:
            replica = Replica(client or api, namespace, identity, **more)
            stack.callback(replica.lease.stop)
            replica.lease.start()
            return replica

        yield make
    assert not [t.name for t in threading.enumerate() if t.name.startswith("lease")]


def read(api: Client, namespace: str) -> LeaseObject:
    return api.get(LeaseObject, "example.com-test", namespace=namespace)


def is_renewal(request: ProxiedRequest) -> bool:
    return (request.verb, request.resource) == ("patch", "leases")


def is_used_up(proxy: FaultProxy, rule: Rule) -> bool:
    return rule not in proxy.rules()


# -- handing over


def test_the_first_takes_it_and_releases_it_to_the_next(
    elect: Elect, api: Client, namespace: str, until: Until
) -> None:
    events = EventRecorder(api, "example.com/test")
    events.start()
    first = elect("first", events=events, **LONG)
    until(lambda: first.calls == ["acquired"], "the first leads")
    made = read(api, namespace).spec
    assert (made.holder_identity, made.lease_duration_seconds) == ("first", 600)
    assert made.lease_transitions == 0
    assert made.acquire_time is not None
    second = elect("second", **LONG)
    until(lambda: second.lease.holder() == "first", "the second sees that")
    until(lambda: read(api, namespace).spec.renew_time != made.renew_time, "it is renewed")
    assert second.calls == []
    holders: list[str] = []
    first.on_call = lambda _: holders.append(read(api, namespace).spec.holder_identity)
    first.lease.stop()
    assert not first.lease.is_held()
    assert first.calls == ["acquired", "lost"]
    assert holders == ["first"], "work must end before the lease is let go of"
    until(lambda: second.calls == ["acquired"], "the second leads")
    taken = read(api, namespace).spec
    assert (taken.holder_identity, taken.lease_duration_seconds) == ("second", 600)
    assert taken.lease_transitions == 1
    assert taken.acquire_time != made.acquire_time
    events.stop()
    told = [e for e in api.list_all(Event, namespace=namespace) if e.reason == "LeaderElection"]
    assert [(e.type, e.message) for e in told] == [("Normal", "first became leader")]
    assert told[0].involved_object.kind == "Lease"


def test_a_released_lease_is_as_the_go_library_leaves_it(
    elect: Elect, api: Client, namespace: str, until: Until
) -> None:
    replica = elect("only", **LONG)
    until(replica.lease.is_held, "it leads")
    replica.lease.stop()
    released = read(api, namespace).spec
    assert (released.holder_identity, released.lease_duration_seconds) == ("", 1)


def test_a_holder_that_is_killed_is_succeeded_after_the_lease_duration(
    elect: Elect, until: Until
) -> None:
    killed = elect("killed")
    until(killed.lease.is_held, "the first leads")
    successor = elect("successor")
    until(lambda: successor.lease.holder() == "killed", "the second waits")
    killed.lease.stop(release=False)
    last_renewal = killed.lease._until - SHORT["renew_deadline_s"]
    until(lambda: successor.calls, "the second leads")
    assert successor.times[0] - last_renewal >= SHORT["duration_s"]


# -- what servers do


@pytest.mark.parametrize("status", [403, 404, 409, 429, 500, 503])
def test_survives_answers_of(
    elect: Elect, client: Client, proxy: FaultProxy, until: Until, status: int
) -> None:
    """Before it is acquired and while it is held; the wait that a 429 asks for is not waited."""
    retry_after = 300 if status == 429 else None
    refused = proxy.on(None, "leases", times=3).fail(status, retry_after_s=retry_after)
    replica = elect("only", client, **LONG)
    until(lambda: replica.calls == ["acquired"], "it leads")
    assert is_used_up(proxy, refused)
    refused = proxy.on(None, "leases", times=3).fail(status, retry_after_s=retry_after)
    until(lambda: is_used_up(proxy, refused), "it is refused again")
    renewed = len(proxy.requests)
    until(lambda: any(is_renewal(r) and r.status == 200 for r in proxy.requests[renewed:]), "a try")
    assert replica.calls == ["acquired"]
    assert replica.lease.dead() is None
    until(lambda: replica.lease.waiting() is None, "nothing is wrong any more")


def test_survives_an_answer_that_is_lost(
    elect: Elect, client: Client, proxy: FaultProxy, until: Until
) -> None:
    proxy.on("create", "leases").cut(half=True)
    replica = elect("only", client, **LONG)
    until(lambda: replica.calls == ["acquired"], "it leads")
    rule = proxy.on("patch", "leases", times=2).fail_after(500)
    until(lambda: is_used_up(proxy, rule), "two renewals are not answered")
    renewed = len(proxy.requests)
    proxy.wait_for(lambda r: is_renewal(r) and r.status == 200)
    until(lambda: any(is_renewal(r) and r.status == 200 for r in proxy.requests[renewed:]), "a try")
    assert replica.calls == ["acquired"]


def test_survives_refused_connections_and_a_callback_that_raises(
    elect: Elect,
    client: Client,
    proxy: FaultProxy,
    until: Until,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(_what: str) -> None:
        raise RuntimeError("a defect of the author's")

    replica = elect("only", client, on_call=fail)
    until(lambda: replica.calls == ["acquired"], "it leads")
    proxy.down()
    until(lambda: replica.calls == ["acquired", "lost"], "it has run out")
    assert not replica.lease.is_held()
    assert replica.lease.waiting() is not None
    proxy.up()
    until(lambda: replica.calls == ["acquired", "lost", "acquired"], "it leads again")
    assert replica.lease.dead() is None
    assert caplog.messages.count("who is told about the lease failed") == 3
    # Tried some ten times a second meanwhile.
    assert caplog.messages.count("the lease cannot be had") == 1


def test_a_lease_that_runs_out_is_told_at_that_moment_though_a_request_hangs(
    elect: Elect, client: Client, proxy: FaultProxy, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if no timeout ended it; and stop does not wait for it."""
    monkeypatch.setattr(Client, "impatient", lambda self, _timeout_s: self)
    replica = elect("only", client)
    until(lambda: replica.calls == ["acquired"], "it leads")
    go_on = threading.Event()
    try:
        proxy.on("patch", "leases", times=None).delay(go_on)
        until(lambda: replica.calls == ["acquired", "lost"], "it has run out")
        hanging = [r for r in proxy.requests if is_renewal(r) and not r.done]
        assert len(hanging) == 1
        started = time.monotonic()
        replica.lease.stop(timeout_s=0.2)
        assert time.monotonic() - started < 10
        assert not hanging[0].done
    finally:
        go_on.set()
        until(lambda: not replica.lease._turns.is_alive(), "its threads end after all")


def test_renewals_have_a_timeout_below_the_renew_deadline(
    elect: Elect, client: Client, proxy: FaultProxy, until: Until
) -> None:
    """One that hangs is given up in time for another one."""
    replica = elect("only", client, duration_s=6.0, renew_deadline_s=5.0)
    until(lambda: replica.calls == ["acquired"], "it leads")
    hangs = proxy.on("patch", "leases").delay(60.0)
    until(lambda: is_used_up(proxy, hangs), "one renewal hangs")
    until_then, asked = replica.lease._until, len(proxy.requests)
    until(lambda: len(proxy.requests) > asked, "the next one")
    until(lambda: replica.lease._until > until_then, "is good")
    assert replica.calls == ["acquired"]


def test_a_deleted_lease_is_made_again_and_held_on(
    elect: Elect, api: Client, namespace: str, until: Until
) -> None:
    replica = elect("only", **LONG)
    until(lambda: replica.calls == ["acquired"], "it leads")
    before = read(api, namespace)
    api.delete(LeaseObject, before.name, uid=before.uid, namespace=namespace)

    def is_back() -> bool:
        try:
            return read(api, namespace).uid != before.uid
        except NotFound:
            return False

    until(is_back, "it is made again")
    assert replica.calls == ["acquired"]
    assert read(api, namespace).spec.holder_identity == "only"


# -- its threads


def test_a_standby_only_reads_also_when_it_stops(
    elect: Elect, client: Client, proxy: FaultProxy, until: Until
) -> None:
    holder = elect("holder", **LONG)
    until(holder.lease.is_held, "the first leads")
    standby = elect("standby", client, **LONG)
    proxy.wait_for(lambda r: r.resource == "leases", count=4)
    assert standby.lease.dead() is None
    standby.lease.stop()
    assert {(r.verb, r.resource) for r in proxy.requests} == {("get", "leases")}
    assert standby.calls == []


def test_a_try_that_hangs_is_told_after_a_minute(
    elect: Elect, client: Client, proxy: FaultProxy
) -> None:
    clock, go_on = Clock(), threading.Event()
    proxy.on("get", "leases", times=None).delay(go_on)
    replica = elect("only", client, clock=clock, duration_s=200.0, renew_deadline_s=100.0)
    proxy.wait_for(lambda r: r.resource == "leases")
    assert replica.lease.dead() is None
    clock.advance(801.0)
    assert str(replica.lease.dead()).startswith("a try for the lease")
    go_on.set()


def test_a_callback_that_hangs_is_told_and_stops_no_renewal(
    elect: Elect, client: Client, proxy: FaultProxy, until: Until
) -> None:
    clock, go_on = Clock(), threading.Event()
    replica = elect("only", client, clock=clock, on_call=lambda _: go_on.wait(60))
    until(lambda: replica.calls, "it is told")
    clock.advance(61.0)
    renewals = sum(map(is_renewal, proxy.requests))
    proxy.wait_for(is_renewal, count=renewals + 3)
    assert replica.lease.is_held()
    assert str(replica.lease.dead()).startswith("who is told about the lease")
    go_on.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ended_is_told(
    elect: Elect, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(_lease: Lease) -> None:
        raise SystemExit

    monkeypatch.setattr(Lease, "attempt", defect)
    replica = elect("only")
    until(lambda: replica.lease.dead() is not None, "its end is told")
    assert str(replica.lease.dead()).startswith("nobody looks after the lease")


# -- what others ask of it


def test_a_write_that_had_to_wait_is_not_sent_once_the_lease_is_lost(
    client: Client, proxy: FaultProxy, namespace: str
) -> None:
    """The server has asked us to come again; meanwhile another one leads."""
    held = iter([True, False])
    proxy.on("create", "persistentvolumes").fail(429, retry_after_s=1)
    with pytest.raises(NotAllowed, match="not the leader any more"):
        client.guarded(lambda: next(held)).create(PersistentVolume, {"metadata": {"name": "v"}})
    assert [r.verb for r in proxy.requests] == ["create"]


def test_the_go_library_and_we_take_turns_at_one_lease(
    elect: Elect,
    api: Client,
    control_plane: ControlPlane,
    proxy: FaultProxy,
    namespace: str,
    until: Until,
    tmp_path: Path,
) -> None:
    """With its leader election as it is in a real kube-scheduler."""
    ours = elect("ours")
    until(ours.lease.is_held, "we lead")
    flags = {
        "kubeconfig": proxy.kubeconfig(),
        "secure-port": 0,
        "leader-elect-lease-duration": "2s",
        "leader-elect-renew-deadline": "1500ms",
        "leader-elect-retry-period": "200ms",
        "leader-elect-resource-name": "example.com-test",
        "leader-elect-resource-namespace": namespace,
    }
    scheduler = ProcessGroup(tmp_path)
    program = str(control_plane.program("kube-scheduler"))
    scheduler.start("scheduler", [program, *(f"--{k}={v}" for k, v in flags.items())])
    try:
        proxy.wait_for(lambda r: (r.verb, r.resource) == ("get", "leases"), count=5)
        assert ours.calls == ["acquired"]
        ours.lease.stop()
        until(lambda: read(api, namespace).spec.holder_identity, "it has taken it from us")
        assert read(api, namespace).spec.lease_transitions == 1
        successor = elect("successor")
        until(lambda: successor.lease.holder(), "we wait")
        assert not successor.lease.is_held()
        scheduler.kill_all()
        until(successor.lease.is_held, "we have taken it from it")
        assert read(api, namespace).spec.lease_transitions == 2
    finally:
        scheduler.kill_all()
    shown = control_plane.kubectl("get", "lease", "-n", namespace)
    assert shown.splitlines()[1].split()[:2] == ["example.com-test", "successor"]
