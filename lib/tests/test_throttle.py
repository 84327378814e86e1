"""The client-side limit, on a clock that is told."""

from __future__ import annotations

import threading

import pytest

from external_storage.kube.throttle import Throttle
from external_storage.testing.builders import Clock


def waits(throttle: Throttle, monkeypatch: pytest.MonkeyPatch, clock: Clock, count: int) -> float:
    """Seconds that ``count`` requests wait in all; the clock goes on by what each one waits."""
    start = clock.now
    monkeypatch.setattr(throttle._closed, "wait", clock.advance)
    for _ in range(count):
        throttle.wait()
    return clock.now - start


def test_a_burst_goes_at_once_and_the_rest_at_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    throttle = Throttle(qps=5, burst=10, clock=clock)
    assert waits(throttle, monkeypatch, clock, 10) == pytest.approx(0, abs=1e-6)
    assert waits(throttle, monkeypatch, clock, 5) == pytest.approx(1.0)


def test_tokens_gather_up_to_the_burst_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    throttle = Throttle(qps=1, burst=3, clock=clock)
    waits(throttle, monkeypatch, clock, 3)
    clock.advance(3600)
    assert waits(throttle, monkeypatch, clock, 3) == pytest.approx(0, abs=1e-6)
    assert waits(throttle, monkeypatch, clock, 1) == pytest.approx(1.0)


def test_close_lets_all_who_wait_go_on() -> None:
    throttle = Throttle(qps=0.001, burst=1)
    throttle.wait()
    waiting = threading.Thread(target=throttle.wait)
    waiting.start()
    throttle.close()
    waiting.join(30)
    assert not waiting.is_alive()
