"""Waiting for what another process brings about."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

import pytest

T = TypeVar("T")

LIMIT_S: Final = 120.0
"""Far above what anything takes: it is waited out only where something never comes."""

_POLL_S: Final = 0.02


def wait_until(
    met: Callable[[], T],
    what: str,
    *,
    limit_s: float = LIMIT_S,
    explain: Callable[[], object] = lambda: "",
) -> T:
    """Poll until ``met`` returns something true, and return that; else fail the test.

    ``explain`` is called for what the test is to say beside that.
    """
    deadline = time.monotonic() + limit_s
    while not (result := met()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {limit_s:.0f} s\n{explain()}")
        time.sleep(_POLL_S)
    return result
