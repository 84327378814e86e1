"""The crash sweep: the program is killed at every step of its work, and then has to make it good.

    class TestHostPathCrashes(CrashSweep):
        def program(...): ...     # as for ``conformance.Conformance``

Steps are the requests to the API server (killed before the server is asked, and once it has
answered) and the system calls that change files or devices (killed before they happen). The work is
one claim that is provisioned, or one that is deleted. The program itself has no part in it.

Every request is tried, and a sample of the system calls, with one outcome each, unless
``CRASH_SWEEP=full`` is in the environment: then every step is tried with every outcome.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Final, Literal

import pytest

from external_storage.testing.conformance import (
    delete_while_down,
    expect_bound_once,
    expect_nothing_left,
)
from external_storage.testing.sandbox import is_bound
from external_storage.testing.tracing import SystemCall, killed_at, read_record, recorded
from external_storage.testing.undertest import Bench, UnderTest

__all__ = ["CrashSweep"]

_MOST_REQUESTS: Final = 100
_DO: Final = (
    "let every step find out by itself whether it has been done, and write down what is begun "
    "before it is"
)

Kill = AbstractContextManager[Callable[[], bool]]
"""Makes the program die of what is done inside; what it gives says whether it did."""


class Outcome(StrEnum):
    """What follows a kill."""

    RESTARTED = "restarted"
    CLAIM_DELETED = "restarted when the claim had been deleted"


class CrashSweep(UnderTest):
    """Subclass it once, in a test file, and say how the provisioner is run (``UnderTest``)."""

    system_calls: ClassVar[int] = 5
    """How many system calls of each work are tried, spread over all it makes."""
    traces_children: ClassVar[bool] = False
    """Those of the processes that the program has started count, too: for one that does its work on
    the back end in a ``WorkerProcess``."""

    def test_killed_at_any_request_of_a_provisioning(self, bench: Bench) -> None:
        _Provisioning(bench).sweep_requests()

    def test_killed_at_any_request_of_a_deletion(self, bench: Bench) -> None:
        _Deletion(bench).sweep_requests()

    def test_killed_at_system_calls_of_a_provisioning(self, bench: Bench, tmp_path: Path) -> None:
        sweep = _Provisioning(bench, traces_children=self.traces_children)
        sweep.sweep_calls(tmp_path, self.system_calls)

    def test_killed_at_system_calls_of_a_deletion(self, bench: Bench, tmp_path: Path) -> None:
        sweep = _Deletion(bench, traces_children=self.traces_children)
        sweep.sweep_calls(tmp_path, self.system_calls)


class _Sweep:
    """Rounds of one kind of work, each on a claim of its own, each ended by a kill."""

    name: ClassVar[str]
    outcomes: ClassVar[tuple[Outcome, ...]]

    def __init__(self, bench: Bench, *, traces_children: bool = False) -> None:
        self.bench = bench
        self._traces_children = traces_children
        self.claim = ""
        self.killed: Counter[Outcome] = Counter()
        self._class = bench.good_class()
        self._claims = itertools.count(1)
        self._full = os.environ.get("CRASH_SWEEP") == "full"

    # -- the work

    def prepare(self) -> None:
        """What has to be there before it begins."""

    def begin(self) -> None:
        """Have the program begin."""
        raise NotImplementedError

    def is_done(self) -> bool:
        """Whether the program has come to its end."""
        raise NotImplementedError

    def make_claim(self) -> None:
        self.claim = f"claim-{next(self._claims)}"
        self.bench.claim(self.claim, self._class)

    def is_provisioned(self) -> bool:
        """The event is the last that is heard of it."""
        events = self.bench.events
        return is_bound(self.bench.get_claim(self.claim)) and bool(
            events(self.claim, "ProvisioningSucceeded")
        )

    # -- at requests

    def sweep_requests(self) -> None:
        """Kill at the first request, the second and so on, until the work ends before that."""
        steps: list[str] = []
        for number in range(1, _MOST_REQUESTS):
            request = self._try_request(number, "before", steps)
            if request is None:
                self._report("API requests", steps, f"all of {number - 1}")
                return
            # The server has nothing of a read: for it there is no after.
            if not request.startswith(("get", "list")):
                self._try_request(number, "after", steps)
        pytest.fail(f"more than {_MOST_REQUESTS} requests for one claim")

    def _try_request(
        self, number: int, when: Literal["before", "after"], steps: list[str]
    ) -> str | None:
        """A round, or one for each outcome; what the request was, None: there are not so many."""
        request = None
        turn = number + (when == "after")
        sample = self.outcomes[turn % len(self.outcomes)]
        for outcome in self.outcomes if self._full else (sample,):
            if self._round(self._at_request(number, when)):
                killed = [r for r in self.bench.proxy.requests if r.fault == "kill"][-1]
                request = f"{killed.verb} {killed.resource}"
                steps.append(f"{number}: {request}, {when} the server has seen it")
                self._settle(outcome, when=f"after a kill at request {steps[-1]}")
        return request

    @contextlib.contextmanager
    def _at_request(
        self, number: int, when: Literal["before", "after"]
    ) -> Iterator[Callable[[], bool]]:
        rule = self.bench.proxy.kill_after(number, self.bench.program.pid, when=when)
        try:
            yield lambda: rule.applied > 0
        finally:
            self.bench.proxy.clear()

    # -- at system calls

    def sweep_calls(self, directory: Path, samples: int) -> None:
        """Kill at the calls that the work was seen to make, or at some of them."""
        if shutil.which("strace") is None:
            pytest.skip("strace is not installed: apt-get install strace")
        calls = self._record(directory / "record")
        turns = itertools.cycle(self.outcomes)
        steps: list[str] = []
        for call in calls if self._full else _spread(calls, samples):
            for outcome in self.outcomes if self._full else (next(turns),):
                if self._round(self._at_call(call, directory / "kill")):
                    steps.append(str(call))
                    self._settle(outcome, when=f"after a kill at {call}")
        self._report("system calls", steps, f"{len(set(steps))} of {len(calls)}")

    def _record(self, output: Path) -> list[SystemCall]:
        """The file-changing calls of the work when nothing happens to it."""
        # Once before, for what is done only the first time in a process.
        self.make_claim()
        self.bench.wait(self.is_provisioned, "a claim is provisioned")
        self._delete()
        self.prepare()
        with recorded(self._traced(), output):
            self.begin()
            self.bench.wait(self.is_done, self.name)
        self._delete()
        return read_record(output, leave_out=self.bench.program.log)

    @contextlib.contextmanager
    def _at_call(self, call: SystemCall, output: Path) -> Iterator[Callable[[], bool]]:
        with killed_at(call, self._traced(), output):
            yield lambda: "killed by SIGKILL" in output.read_text()

    def _traced(self) -> list[int]:
        program = self.bench.program
        return program.pids if self._traces_children else [program.pid]

    # -- one round

    def _round(self, kill: Kill) -> bool:
        """Have the program killed in the work; False if it came to its end without that."""
        self.prepare()
        with kill as was_killed:
            self.begin()
            self.bench.wait(
                lambda: not self.bench.program.running or was_killed() or self.is_done(),
                f"{self.name}, or a kill",
            )
            if was_killed() and self.bench.program.running:
                # It was in a process that the program had started: all of them die together.
                self.bench.program.kill()
        if was_killed():
            self.bench.program.wait_ended()
            return True
        self._delete()
        return False

    def _settle(self, outcome: Outcome, *, when: str) -> None:
        """What follows a kill, and that it leaves nothing."""
        self.killed[outcome] += 1
        if outcome is Outcome.CLAIM_DELETED:
            delete_while_down(self.bench, self.claim)
        self.bench.restart()
        if outcome is Outcome.RESTARTED:
            expect_bound_once(self.bench, self.claim, when=when, do=_DO)
        self._delete(when=f"{outcome}, {when}")

    def _delete(self, when: str = "without a kill") -> None:
        self.bench.delete_claims()
        expect_nothing_left(self.bench, when=when, do=_DO)

    def _report(self, what: str, steps: list[str], how_many: str) -> None:
        """For who runs pytest with -rP or -s."""
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in self.killed.items())
        print(f"crash sweep, {self.name}: {how_many} {what}, {len(steps)} kills: {outcomes}")
        for step in dict.fromkeys(steps):
            print(f"  {step}")
        assert steps, "no kill fell into the work: nothing has been tested"


class _Provisioning(_Sweep):
    name = "a claim is provisioned"
    outcomes = (Outcome.RESTARTED, Outcome.CLAIM_DELETED)

    def begin(self) -> None:
        self.make_claim()

    def is_done(self) -> bool:
        return self.is_provisioned()


class _Deletion(_Sweep):
    name = "a claim is deleted"
    outcomes = (Outcome.CLAIM_DELETED,)

    def prepare(self) -> None:
        self.make_claim()
        self.bench.wait(self.is_provisioned, "the claim to be deleted is Bound")

    def begin(self) -> None:
        self.bench.delete_claims(self.claim)

    def is_done(self) -> bool:
        return not self.bench.left()


def _spread(calls: list[SystemCall], count: int) -> list[SystemCall]:
    """``count`` of them, the first and the last among them."""
    if len(calls) <= count:
        return calls
    step = (len(calls) - 1) / (count - 1)
    return [calls[round(number * step)] for number in range(count)]
