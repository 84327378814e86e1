"""The brake on mass release."""

from __future__ import annotations

import pytest

from external_storage.testing.builders import Clock
from local_volume_provisioner.brake import Brake


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def brake(clock: Clock) -> Brake:
    return Brake(2, 600.0, clock=clock)


def test_few_at_a_time_never_wait(brake: Brake, clock: Clock) -> None:
    for number in range(20):
        brake.note([str(number), str(number + 1)])
        assert not brake.reason()
        clock.advance(601)


def test_many_wait_until_no_more_come(brake: Brake, clock: Clock) -> None:
    brake.note("abc")
    assert "more than 2 volumes" in brake.reason()
    clock.advance(500)
    brake.note("abcd")
    clock.advance(500)
    brake.note("abcd")
    assert brake.left_s() == pytest.approx(100)
    clock.advance(101)
    brake.note("abcd")
    assert not brake.reason()


def test_what_has_been_cleaned_at_once_counts_too(brake: Brake, clock: Clock) -> None:
    """Fifty releases in fifty seconds, each wiped within a second: the third one waits."""
    for number in range(2):
        brake.note([str(number)])
        assert not brake.reason()
        brake.note([])
        clock.advance(1)
    brake.note(["2"])
    assert brake.reason()


def test_approving_one_lets_no_other_go(brake: Brake) -> None:
    brake.note("abc")
    brake.note("ab")
    assert brake.reason()


def test_it_can_be_off(clock: Clock) -> None:
    brake = Brake(0, 600.0, clock=clock)
    brake.note(map(str, range(100)))
    assert not brake.reason()
