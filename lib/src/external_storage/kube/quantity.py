"""Quantities as the API writes them: ``1Gi``, ``500M``, ``1e9``, ``0.5Ti``; exact, never floats."""

from __future__ import annotations

import math
import re
from fractions import Fraction

_SUFFIXES: dict[str, Fraction] = {
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 1000),
    "": Fraction(1),
    "k": Fraction(10**3),
    "M": Fraction(10**6),
    "G": Fraction(10**9),
    "T": Fraction(10**12),
    "P": Fraction(10**15),
    "E": Fraction(10**18),
    "Ki": Fraction(2**10),
    "Mi": Fraction(2**20),
    "Gi": Fraction(2**30),
    "Ti": Fraction(2**40),
    "Pi": Fraction(2**50),
    "Ei": Fraction(2**60),
}
_FORM = re.compile(
    r"(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))"
    r"(?:[eE](?P<exponent>[+-]?[0-9]{1,3})|(?P<suffix>[KMGTPE]i|[numkMGTPE]?))",
    re.ASCII,
)
_BINARY = ("Ei", "Pi", "Ti", "Gi", "Mi", "Ki")


def parse(text: str) -> Fraction:
    """The exact value of a quantity; ``ValueError`` names what is not one."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a quantity: want a number with a suffix such as Gi or M")
    number = Fraction(match["number"])
    if match["exponent"] is not None:
        return number * Fraction(10) ** int(match["exponent"])
    return number * _SUFFIXES[match["suffix"]]


def to_bytes(text: str) -> int:
    """A quantity as whole bytes, rounded up as the API server does."""
    return math.ceil(parse(text))


def from_bytes(count: int) -> str:
    """The shortest exact quantity with a binary suffix: ``1073741824`` is ``1Gi``."""
    if count < 0:
        raise ValueError(f"{count} bytes: a size is not negative")
    for suffix in _BINARY:
        unit = _SUFFIXES[suffix].numerator
        if count and count % unit == 0:
            return f"{count // unit}{suffix}"
    return str(count)
