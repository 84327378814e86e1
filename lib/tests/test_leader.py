"""Who may take a lease and when, on clocks that are told and a server that is played."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from external_storage import Lease, leader
from external_storage.kube.client import Client
from external_storage.kube.errors import (
    AlreadyExists,
    Conflict,
    KubeError,
    NotFound,
    Unavailable,
)
from external_storage.kube.types import LeaseObject, LeaseSpec, ObjectMeta
from external_storage.leader import Sighting, lease_name, may_take, sight
from external_storage.testing.builders import Clock

WALL = "2026-01-01T00:00:00.000000Z"


def lease_object(
    holder: str = "other", *, renewed: str = WALL, version: int = 1, duration: int = 15
) -> LeaseObject:
    return LeaseObject(
        metadata=ObjectMeta(name="lease", resource_version=str(version)),
        spec=LeaseSpec(holder_identity=holder, renew_time=renewed, lease_duration_seconds=duration),
    )


def seen(since: float, holder: str = "other", duration_s: float = 15.0) -> Sighting:
    return Sighting(holder=holder, renewed=WALL, version="1", duration_s=duration_s, since=since)


# -- the pure part


@pytest.mark.parametrize(
    ("sighting", "now", "may"),
    [
        (None, 100.0, True),
        (seen(100.0), 100.0, False),
        (seen(100.0), 114.9, False),
        (seen(100.0), 115.0, True),
        (seen(100.0, holder=""), 100.0, True),
        (seen(100.0, holder="me"), 100.0, True),
        (seen(100.0, duration_s=60.0), 130.0, False),
    ],
)
def test_a_lease_is_taken_when_it_is_free_ours_or_has_run_out(
    sighting: Sighting | None, now: float, may: bool
) -> None:
    assert may_take(sighting, "me", now=now) is may


def test_a_record_that_stays_as_it_is_runs_out_from_when_it_was_first_seen() -> None:
    first = sight(lease_object(), None, now=100.0, default_s=15.0)
    later = sight(lease_object(), first, now=110.0, default_s=15.0)
    assert (later.since, later.runs_out) == (100.0, 115.0)


@pytest.mark.parametrize(
    "changed",
    [
        lease_object("third"),
        lease_object(renewed="2026-01-01T00:00:04.000000Z"),
        lease_object(renewed="1970-01-01T00:00:00.000000Z"),
        lease_object(version=2),
    ],
)
def test_any_change_of_the_record_begins_the_count_anew(changed: LeaseObject) -> None:
    first = sight(lease_object(), None, now=100.0, default_s=15.0)
    assert sight(changed, first, now=110.0, default_s=15.0).since == 110.0


def test_the_holders_own_duration_counts_and_ours_only_without_one() -> None:
    assert sight(lease_object(duration=60), None, now=0.0, default_s=15.0).runs_out == 60.0
    assert sight(lease_object(duration=0), None, now=0.0, default_s=15.0).runs_out == 15.0


@pytest.mark.parametrize(
    ("provisioner", "lease"),
    [
        ("example.com/nfs", "example.com-nfs"),
        ("nfs", "nfs"),
        ("example.com/My_Files", "example.com-my-files"),
    ],
)
def test_the_lease_is_named_as_by_the_go_library(provisioner: str, lease: str) -> None:
    assert lease_name(provisioner) == lease


@pytest.mark.parametrize("times", [(15, 15, 4), (15, 4, 4), (4, 10, 15), (15, 10, 0)])
def test_times_that_cannot_work_are_refused(times: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="retry_period_s"):
        replica(Server(Clock()), "a", times=times)


# -- with a server that is played


class Server:
    """One Lease object with the rules of the real server; a Client as far as ``Lease`` goes.

    ``on_way`` is called before and after each request is carried out, and may raise.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.object: LeaseObject | None = None
        self.version = 0
        self.requests: list[str] = []
        self.on_way: Callable[[], object] = lambda: None

    def impatient(self, _timeout_s: float) -> Server:
        return self

    def get(self, _kind: object, _name: str, *, namespace: str) -> LeaseObject:
        return self._request("get", self._found)

    def create(self, _kind: object, fields: Any, *, namespace: str) -> LeaseObject:
        def carry_out() -> LeaseObject:
            if self.object is not None:
                raise AlreadyExists("there", code=409)
            return self._write(fields["spec"])

        return self._request("create", carry_out)

    def patch(self, _kind: object, _name: str, patch: Any, *, namespace: str) -> LeaseObject:
        def carry_out() -> LeaseObject:
            if self._found().metadata.resource_version != patch["metadata"]["resourceVersion"]:
                raise Conflict("changed", code=409)
            return self._write(patch["spec"])

        return self._request("patch", carry_out)

    def _request(self, verb: str, carry_out: Callable[[], LeaseObject]) -> LeaseObject:
        self.requests.append(verb)
        self.on_way()
        found = carry_out()
        self.on_way()
        return found

    def _found(self) -> LeaseObject:
        if self.object is None:
            raise NotFound("none", code=404)
        return self.object

    def _write(self, spec: dict[str, Any]) -> LeaseObject:
        self.version += 1
        before = self.object.spec if self.object is not None else LeaseSpec()
        self.object = LeaseObject(
            metadata=ObjectMeta(name="lease", resource_version=str(self.version)),
            spec=LeaseSpec(
                holder_identity=spec["holderIdentity"],
                lease_duration_seconds=spec["leaseDurationSeconds"],
                acquire_time=spec.get("acquireTime", before.acquire_time),
                renew_time=spec["renewTime"],
                lease_transitions=spec.get("leaseTransitions", before.lease_transitions),
            ),
        )
        return self.object


def replica(
    server: Server,
    identity: str,
    *,
    offset: float = 0.0,
    times: tuple[float, float, float] = (15, 10, 4),
    **more: Any,
) -> Lease:
    """One that is not started: its tries are made by the test. ``offset``: of its own clock."""
    duration, deadline, period = times
    return Lease(
        cast(Client, server),
        name="lease",
        namespace="default",
        identity=identity,
        duration_s=duration,
        renew_deadline_s=deadline,
        retry_period_s=period,
        clock=lambda: server.clock() + offset,
        **more,
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1_000_000))
def test_two_replicas_never_hold_it_at_once(seed: int) -> None:
    """Whenever they try, however long a request is on its way, whichever requests and answers get
    lost, and whatever their clocks show."""
    dice = random.Random(seed)
    clock = Clock()
    server = Server(clock)
    # Nothing to spare between the deadline and the duration: each second is one too many.
    replicas = [
        replica(server, name, offset=1e5 * n, times=(15, 14.5, 4)) for n, name in enumerate("abc")
    ]
    busy: set[Lease] = set()
    terms: list[str] = []

    def something_happens() -> None:
        event, lease = dice.random(), dice.choice(replicas)
        if event < 0.5 and lease not in busy:
            busy.add(lease)
            with contextlib.suppress(KubeError):
                lease.attempt()
            busy.remove(lease)
        elif event < 0.9:
            clock.advance(dice.uniform(0.0, 5.0))
        holders = [lease.holder() for lease in replicas if lease.is_held()]
        assert len(holders) <= 1
        terms.extend(holder for holder in holders if holder not in terms[-1:])

    def on_way() -> None:
        """Of a request: others make theirs meanwhile."""
        for _ in range(dice.choice([0, 0, 0, 1, 2, 3])):
            something_happens()
        if dice.random() < 0.1:
            raise Unavailable("lost on its way")

    server.on_way = on_way
    with pytest.MonkeyPatch.context() as patch:
        # The wall clocks stand still: nobody may need them.
        patch.setattr(leader, "_now", lambda: WALL)
        for _ in range(600):
            something_happens()
    assert len(terms) > 3


def test_it_is_held_from_before_the_renewal_was_sent_until_the_renew_deadline() -> None:
    clock = Clock()
    server = Server(clock)
    lease = replica(server, "a")
    server.on_way = lambda: clock.advance(3.0)
    lease.attempt()
    # Asked at 0, not found at 3; created at 6, told at 9: held for 10 s from 3.
    clock.advance(3.9)
    assert lease.is_held()
    clock.advance(0.2)
    assert not lease.is_held()


def test_another_clock_in_the_record_is_not_believed() -> None:
    server = Server(Clock())
    server.object = lease_object("go", renewed="1970-01-01T00:00:00.000000Z")
    lease = replica(server, "a")
    lease.attempt()
    server.clock.advance(14.9)
    lease.attempt()
    assert not lease.is_held()
    assert lease.waiting() == "the lease default/lease is held by go"
    server.clock.advance(0.1)
    lease.attempt()
    assert lease.is_held()
    assert lease.waiting() is None


def test_the_standard_fields_are_kept_over_a_change_of_the_holder() -> None:
    server = Server(Clock())
    server.object = lease_object("")
    first = replica(server, "a", times=(2.5, 2, 1))
    first.attempt()
    taken = server.object.spec
    assert (taken.holder_identity, taken.lease_duration_seconds) == ("a", 3)
    assert taken.lease_transitions == 1
    assert taken.acquire_time == taken.renew_time != WALL
    first.attempt()
    renewed = server.object.spec
    assert (renewed.acquire_time, renewed.lease_transitions) == (taken.acquire_time, 1)
    assert renewed.renew_time is not None
    assert taken.renew_time is not None
    assert renewed.renew_time >= taken.renew_time


def test_a_renewal_is_one_request() -> None:
    server = Server(Clock())
    lease = replica(server, "a")
    lease.attempt()
    server.requests.clear()
    lease.attempt()
    assert server.requests == ["patch"]


def test_a_write_whose_answer_was_lost_is_found_again() -> None:
    server = Server(Clock())
    lease = replica(server, "a")
    # To look, to create; and the third time on its way back.
    way = iter([None, None, Unavailable("no answer")])

    def on_way() -> None:
        if (error := next(way, None)) is not None:
            raise error

    server.on_way = on_way
    with pytest.raises(Unavailable):
        lease.attempt()
    assert not lease.is_held()
    assert server.object is not None
    lease.attempt()
    assert lease.is_held()


def test_a_lease_taken_by_force_is_lost_at_once() -> None:
    server = Server(Clock())
    lease = replica(server, "a")
    lease.attempt()
    server.version = 7
    server.object = lease_object("thief", version=7)
    lease.attempt()
    assert not lease.is_held()
    assert lease.holder() == "thief"


def test_a_lease_that_an_admin_deletes_is_made_again_by_its_holder() -> None:
    server = Server(Clock())
    lease = replica(server, "a")
    lease.attempt()
    server.object = None
    lease.attempt()
    assert lease.is_held()
    assert lease.holder() == "a"


def test_a_deleted_lease_is_its_holders_until_it_runs_out() -> None:
    """The holder may work on: it does not know yet."""
    server = Server(Clock())
    holder, standby = replica(server, "a"), replica(server, "b")
    holder.attempt()
    standby.attempt()
    server.object = None
    standby.attempt()
    assert holder.is_held()
    assert not standby.is_held()
    server.clock.advance(15.0)
    standby.attempt()
    assert standby.is_held()


def test_who_waits_looks_again_when_the_lease_runs_out_and_not_later() -> None:
    server = Server(Clock())
    server.object = lease_object("other", duration=15)
    lease = replica(server, "a")
    lease.attempt()
    start = server.clock()
    assert 4.0 <= lease._pause(start, start) <= 4.0 * 1.2
    assert lease._pause(start + 12.0, start + 12.0) == pytest.approx(3.0)
    assert 1.0 <= lease._pause(start, start + 3.0) <= 1.8
    assert lease._pause(start, start + 6.0) == 0.0


def test_stop_before_start_and_twice_does_nothing() -> None:
    server = Server(Clock())
    lease = replica(server, "a")
    lease.stop()
    lease.stop()
    assert server.requests == []
