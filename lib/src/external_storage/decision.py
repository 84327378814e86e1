"""What was decided about an object, and why: the answer of every ``should_*`` function."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """The two answers; trouble that calls for a retry is an exception and not a decision."""

    PROCEED = "proceed"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict; a SKIP says why in a few words, for the debug log."""

    verdict: Verdict
    reason: str = ""

    @property
    def proceed(self) -> bool:
        return self.verdict is Verdict.PROCEED


PROCEED = Decision(Verdict.PROCEED)


def skip(reason: str) -> Decision:
    return Decision(Verdict.SKIP, reason)
