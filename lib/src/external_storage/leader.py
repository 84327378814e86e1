"""Leader election: one of several replicas holds a Lease object, the others wait for it.

What keeps two from holding it at once is that nobody compares clocks. The holder counts from before
it *sent* its last successful renewal, and stops after the renew deadline. The others count from
when they first *saw* the record as it is, and take it after the lease duration, which is longer.
Every write has the resource version of what was read as its precondition.

The object is the same as the Go library's, field by field: replicas of both kinds can take turns.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from external_storage.events import EventRecorder
from external_storage.kube.client import Client
from external_storage.kube.errors import Conflict, KubeError, NotFound
from external_storage.kube.types import LeaseObject
from external_storage.logs import get_logger

log = get_logger(__name__)

JITTER = 0.2
"""The part by which a wait between two tries may be longer, so that replicas do not march in step;
the settings want the renew deadline to be above 1.2 times the retry period."""

_RELEASE_TRIES = 3
_HANGS_AFTER_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What a Lease object was seen to say."""

    holder: str
    renewed: str | None
    version: str
    duration_s: float
    since: float
    """When, by our own clock, it was first seen to say just this."""

    @property
    def runs_out(self) -> float:
        """When it is free if it does not change, by our own clock."""
        return self.since + self.duration_s if self.holder else -math.inf


def sight(lease: LeaseObject, before: Sighting | None, *, now: float, default_s: float) -> Sighting:
    """What ``lease`` says; ``now``: after its answer had come, so that it was written before that.

    ``default_s``: the lease duration where the object has none.
    """
    spec, version = lease.spec, lease.metadata.resource_version
    same = before is not None and (before.holder, before.renewed, before.version) == (
        spec.holder_identity,
        spec.renew_time,
        version,
    )
    return Sighting(
        holder=spec.holder_identity,
        renewed=spec.renew_time,
        version=version,
        duration_s=float(spec.lease_duration_seconds or default_s),
        since=before.since if before is not None and same else now,
    )


def may_take(seen: Sighting | None, identity: str, *, now: float) -> bool:
    """Whether a lease that was last seen like this may be taken, made or renewed by ``identity``.

    None: none was ever seen. One that was deleted is still its holder's until it runs out.
    """
    return seen is None or seen.holder == identity or now >= seen.runs_out


def lease_name(provisioner_name: str) -> str:
    """The name of a provisioner's lease: the Go library's, where that is one an object may have."""
    return provisioner_name.lower().replace("/", "-").replace("_", "-")


def boot_time() -> float:
    """Seconds on a clock that never jumps and goes on while the machine is suspended: others take
    the lease meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """Holds, or waits for, one Lease object, from ``start`` to ``stop``.

    ``on_acquired`` and ``on_lost`` are called in turns, from one thread. Another one makes the
    requests: neither a slow callback nor an API server that hangs makes the other one late.

    Args:
        client: best one of its own, without a limit of requests a second.
        identity: unique for ever, not only among those that run: no second life is to take the
            lease of the first for its own.
        duration_s: how long others wait after the last renewal; whole seconds, rounded up.
        renew_deadline_s: how long it is held after the last renewal; below the duration.
        retry_period_s: between two renewals, and between two looks of those who wait.
        on_acquired: work may begin; ``is_held`` is what each write has to ask.
        on_lost: it must end; also called by ``stop``, before the lease is let go of.
        events: where to tell who became leader.
    """

    def __init__(
        self,
        client: Client,
        *,
        name: str,
        namespace: str,
        identity: str,
        duration_s: float = 15.0,
        renew_deadline_s: float = 10.0,
        retry_period_s: float = 4.0,
        on_acquired: Callable[[], None] = lambda: None,
        on_lost: Callable[[], None] = lambda: None,
        events: EventRecorder | None = None,
        clock: Callable[[], float] = boot_time,
    ) -> None:
        """Does no I/O; ``start`` does. ``ValueError``: times that cannot work."""
        if not 0 < retry_period_s < renew_deadline_s < duration_s:
            raise ValueError("want 0 < retry_period_s < renew_deadline_s < duration_s")
        # Two tries fit into the time a renewal is good for, even if the server answers neither.
        self._client = client.impatient(renew_deadline_s / 2)
        self._name = name
        self._namespace = namespace
        self.identity = identity
        self._duration_s = math.ceil(duration_s)
        self._renew_deadline_s = renew_deadline_s
        self._retry_period_s = retry_period_s
        self._on_acquired = on_acquired
        self._on_lost = on_lost
        self._events = events
        self._clock = clock
        self._condition = threading.Condition()
        self._until = -math.inf
        self._term = 0
        """Counts how often it was acquired: a gap shows even if nobody looked during it."""
        self._seen: Sighting | None = None
        self._last: LeaseObject | None = None
        self._wrote = False
        """Whether the object may name us, even if we were never told so."""
        self._ending = False
        self._release_at_end = True
        self._stopping = threading.Event()
        self._told: set[str] = set()
        self._trouble: str | None = None
        self._tried_at: float = clock()
        self._calling_since: float | None = None
        self._tries = threading.Thread(target=self._run_tries, name="lease-tries", daemon=True)
        self._turns = threading.Thread(target=self._run_turns, name="lease", daemon=True)

    # -- life

    def start(self) -> None:
        """Try for the lease from now on."""
        self._tried_at = self._clock()
        self._tries.start()
        self._turns.start()

    def stop(self, timeout_s: float = 5.0, *, release: bool = True) -> None:
        """End it within ``timeout_s``; a lease that is held is let go of, for others to take.

        ``release=False``: leave it to run out, for work may still be going on.
        """
        with self._condition:
            self._ending, self._release_at_end = True, release
            self._stopping.set()
            self._condition.notify_all()
        if self._turns.ident is None:
            return
        self._turns.join(timeout_s)
        if self._turns.is_alive():
            log.warning("the lease is left to run out: no time to release it", lease=self.key)

    # -- asking

    @property
    def key(self) -> str:
        """``namespace/name`` of the object."""
        return f"{self._namespace}/{self._name}"

    def is_held(self) -> bool:
        """Whether it is certain that nobody else holds it at this moment. Cheap: ask often."""
        return not self._ending and self._clock() < self._until

    def holder(self) -> str:
        """Identity of the holder as last seen; empty: nobody."""
        seen = self._seen
        return seen.holder if seen is not None else ""

    def waiting(self) -> str | None:
        """Why it is not held, or None."""
        if self.is_held():
            return None
        return self._trouble or f"the lease {self.key} is held by {self.holder() or 'nobody'}"

    def dead(self) -> str | None:
        """What is wrong with our threads, that only a new process would set right, or None."""
        if self._turns.ident is None or self._ending:
            return None
        if not (self._tries.is_alive() and self._turns.is_alive()):
            return f"nobody looks after the lease {self.key} any more"
        now, limit_s = self._clock(), max(_HANGS_AFTER_S, 4.0 * self._duration_s)
        if now - self._tried_at > limit_s:
            return f"a try for the lease {self.key} hangs"
        calling_since = self._calling_since
        if calling_since is not None and now - calling_since > limit_s:
            return f"who is told about the lease {self.key} hangs"
        return None

    # -- the thread that makes the requests

    def _run_tries(self) -> None:
        while not self._stopping.is_set():
            started = self._clock()
            self._try()
            self._tried_at = now = self._clock()
            self._stopping.wait(self._pause(started, now))

    def _pause(self, started: float, now: float) -> float:
        """Seconds until the next try: counted from the start of the last one, so that a slow server
        does not slow down the renewals; sooner, if the lease we wait for runs out before that."""
        pause = self._retry_period_s * (1.0 + JITTER * random.random()) - (now - started)
        seen = self._seen
        if seen is not None and seen.holder != self.identity and seen.runs_out > now:
            pause = min(pause, seen.runs_out - now)
        return max(pause, 0.0)

    def _try(self) -> None:
        """One try, whatever may come of it."""
        try:
            self.attempt()
        except Conflict as error:
            log.debug("another was faster with the lease", lease=self.key, error=str(error))
        except Exception as error:
            self._failed(error)
        else:
            if self._told:
                log.info("the lease can be read and written again", lease=self.key)
            self._told.clear()
            self._trouble = None

    def _failed(self, error: Exception) -> None:
        """Told once for each reason, and not at every try."""
        reason = f"{type(error).__name__} {getattr(error, 'reason', '')}".rstrip()
        self._trouble = str(error) or reason
        if reason in self._told:
            return
        self._told.add(reason)
        if isinstance(error, KubeError):
            log.warning("the lease cannot be had", lease=self.key, error=str(error))
        else:
            log.exception("a try for the lease failed", exc=error, lease=self.key)

    def attempt(self) -> None:
        """Renew the lease, or look at it and take it if it may be taken; raises ``KubeError``."""
        if self._last is not None and self.holder() == self.identity:
            try:
                self._take(self._last)
                return
            except (Conflict, NotFound):
                # Somebody has written or deleted it, or the answer to a write of ours was lost.
                log.debug("the lease is not as we left it", lease=self.key)
        try:
            lease = self._client.get(LeaseObject, self._name, namespace=self._namespace)
        except NotFound:
            if may_take(self._seen, self.identity, now=self._clock()):
                self._make()
            return
        now = self._clock()
        self._note(lease, now)
        if may_take(self._seen, self.identity, now=now):
            self._take(lease)
        else:
            self._yield_to_other()

    def _take(self, lease: LeaseObject) -> None:
        spec: dict[str, Any] = {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": self._duration_s,
            "renewTime": _now(),
        }
        if lease.spec.holder_identity != self.identity:
            spec["acquireTime"] = spec["renewTime"]
            spec["leaseTransitions"] = lease.spec.lease_transitions + 1
        self._wrote, sent = True, self._clock()
        self._won(self._patch(lease, spec), sent)

    def _make(self) -> None:
        now = _now()
        spec = {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": self._duration_s,
            "acquireTime": now,
            "renewTime": now,
            "leaseTransitions": 0,
        }
        fields = {"metadata": {"name": self._name, "namespace": self._namespace}, "spec": spec}
        self._wrote, sent = True, self._clock()
        self._won(self._client.create(LeaseObject, fields, namespace=self._namespace), sent)

    def _patch(self, lease: LeaseObject, spec: dict[str, Any]) -> LeaseObject:
        # With the version it is a precondition: Conflict if anybody has written since.
        version = {"resourceVersion": lease.metadata.resource_version}
        patch = {"metadata": version, "spec": spec}
        return self._client.patch(LeaseObject, self._name, patch, namespace=self._namespace)

    def _note(self, lease: LeaseObject, now: float) -> None:
        self._last = lease
        self._seen = sight(lease, self._seen, now=now, default_s=self._duration_s)

    def _won(self, lease: LeaseObject, sent: float) -> None:
        """The object names us, since some moment after ``sent``."""
        now = self._clock()
        self._note(lease, now)
        with self._condition:
            if now >= self._until:
                self._term += 1
            self._until = sent + self._renew_deadline_s
            self._condition.notify_all()

    def _yield_to_other(self) -> None:
        with self._condition:
            self._until = -math.inf
            self._condition.notify_all()

    # -- the thread that calls back

    def _run_turns(self) -> None:
        told = 0
        while True:
            with self._condition:
                while (term := self._term if self.is_held() else 0) == told and not self._ending:
                    # Also at the very moment at which it runs out, whatever the requests do.
                    self._condition.wait(max(self._until - self._clock(), 0.0) if told else None)
            if told:
                told = 0
                tell = log.info if self._ending else log.warning
                tell("not the leader any more", lease=self.key, identity=self.identity)
                self._call(self._on_lost)
            elif term:
                told = term
                log.info("became the leader", lease=self.key, identity=self.identity)
                self._tell_became_leader()
                self._call(self._on_acquired)
            elif self._ending:
                break
        self._tries.join()
        if self._release_at_end and self._wrote:
            self._release()

    def _call(self, callback: Callable[[], None]) -> None:
        self._calling_since = self._clock()
        try:
            callback()
        except (Exception, SystemExit):
            log.exception("who is told about the lease failed", lease=self.key)
        self._calling_since = None

    def _tell_became_leader(self) -> None:
        lease = self._last
        if self._events is not None and lease is not None:
            self._events.normal(lease, "LeaderElection", f"{self.identity} became leader")

    def _release(self) -> None:
        spec = {"holderIdentity": "", "leaseDurationSeconds": 1}
        for _ in range(_RELEASE_TRIES):
            try:
                # Read once more: a renewal whose answer was lost may have been carried out.
                lease = self._client.get(LeaseObject, self._name, namespace=self._namespace)
                if lease.spec.holder_identity == self.identity:
                    self._patch(lease, {**spec, "renewTime": _now()})
                    log.info("lease released", lease=self.key)
                return
            except NotFound:
                return
            except Exception as error:
                log.warning("the lease cannot be released", lease=self.key, error=str(error))


def _now() -> str:
    """MicroTime, for people to read: nobody counts on it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
