"""Name patterns as the reference has them: a list of Go globs, separated by commas."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Globs:
    """Matches a name that any of the patterns matches."""

    text: str
    patterns: tuple[re.Pattern[str], ...]

    @classmethod
    def parse(cls, text: str) -> Globs:
        """From ``"nvme*, sd?"``; blanks around a pattern do not count. Raises ValueError."""
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise ValueError(f"{text!r} has an empty pattern")
        return cls(",".join(parts), tuple(re.compile(_expression(part)) for part in parts))

    def match(self, name: str) -> bool:
        return any(pattern.fullmatch(name) for pattern in self.patterns)


def _expression(glob: str) -> str:
    """The regular expression of one Go glob (path/filepath.Match)."""
    result, rest = "(?s:", glob
    while rest:
        head, rest = rest[0], rest[1:]
        if head == "*":
            result += "[^/]*"
        elif head == "?":
            result += "[^/]"
        elif head == "[":
            part, rest = _range(rest, glob)
            result += part
        elif head == "\\":
            if not rest:
                raise ValueError(f"{glob!r} ends with a backslash")
            result += re.escape(rest[0])
            rest = rest[1:]
        else:
            result += re.escape(head)
    return result + ")"


def _range(rest: str, glob: str) -> tuple[str, str]:
    """The character class at the beginning of ``rest``, behind its bracket, and what follows."""
    negated = rest.startswith("^")
    rest = rest[negated:]
    items = ""
    while not rest.startswith("]") or not items:
        low, rest = _character(rest, glob)
        high = low
        if rest.startswith("-"):
            high, rest = _character(rest[1:], glob)
        if high < low:
            raise ValueError(f"{glob!r} has the range {low}-{high}, which is empty")
        items += f"{re.escape(low)}-{re.escape(high)}"
    return f"[{'^' if negated else ''}{items}]", rest[1:]


def _character(rest: str, glob: str) -> tuple[str, str]:
    if rest.startswith("\\"):
        rest = rest[1:]
    elif rest[:1] in ("-", "]"):
        raise ValueError(f"{glob!r} has a malformed [...]")
    if not rest:
        raise ValueError(f"{glob!r} has a [ without its ]")
    return rest[0], rest[1:]
