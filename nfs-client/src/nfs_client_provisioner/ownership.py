"""Who owns a new directory, by what a class says: group, user, mode."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from external_storage import PersistentVolumeClaim
from external_storage.path_template import BadExpansion, Template

AUTO: Final = "auto"
NONE: Final = "none"

_MAX_ID: Final = 2**32 - 2  # the one above means "leave it alone"
_NUMBER = re.compile(r"[0-9]{1,10}", re.ASCII)
_OCTAL = re.compile(r"(?:0o)?([0-7]{3,5})", re.ASCII)
_FOR_GROUP: Final = 0o2770
_FOR_EVERYBODY: Final = 0o777  # as nfs-subdir makes them


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the parameters of a class ask for one claim's directory."""

    uid: int | None
    gid: int | None
    """None for ``auto`` and ``none``; ``is_auto`` tells them apart."""
    is_auto: bool
    mode: int


def wanted(
    claim: PersistentVolumeClaim, *, volume_name: str, gid: str, uid: str, mode: str
) -> Wanted:
    """Fill in the patterns of the parameters; ValueError names the parameter.

    Users choose what goes into a pattern, so it cannot give 0: a directory of root's group, or of
    root, would be within reach of others that are.
    """

    def filled(key: str, text: str, read: Callable[[str], int]) -> int:
        template = Template.parse(text)
        try:
            value = read(template.fill(claim, volume_name=volume_name))
        except (BadExpansion, ValueError) as error:
            raise ValueError(f"parameter {key!r}: {error}") from error
        if value == 0 and not template.is_constant:
            raise ValueError(f"parameter {key!r}: a pattern must not give 0")
        return value

    word = gid.strip().lower()
    default_mode = _FOR_EVERYBODY if word == NONE else _FOR_GROUP
    return Wanted(
        uid=filled("uid", uid, _read_id) if uid else None,
        gid=None if word in (AUTO, NONE) else filled("gid", gid, _read_id),
        is_auto=word == AUTO,
        mode=filled("mode", mode, _read_mode) if mode else default_mode,
    )


def check_gid(text: str) -> None:
    """ValueError for what no claim could make a group of."""
    if text.strip().lower() in (AUTO, NONE):
        return
    if not Template.parse(text).is_constant:
        return
    try:
        value = _read_id(text)
    except ValueError as error:
        raise ValueError(f"{error}; or auto, none, a pattern") from None
    if value == 0:
        raise ValueError("0 is root's group: want auto, none, a pattern or another number")


def check_uid(text: str) -> None:
    """Likewise for a user; empty leaves it to the server."""
    if text and Template.parse(text).is_constant:
        _read_id(text)


def check_mode(text: str) -> None:
    """Likewise for a mode; empty is the default."""
    if text and Template.parse(text).is_constant:
        _read_mode(text)


def _read_id(text: str) -> int:
    plain = text.strip()
    if _NUMBER.fullmatch(plain) and int(plain) <= _MAX_ID:
        return int(plain)
    raise ValueError(f"{text[:80]!r} is not a number from 0 to {_MAX_ID}")


def _read_mode(text: str) -> int:
    found = _OCTAL.fullmatch(text.strip())
    if found is None or int(found[1], 8) > 0o7777:
        raise ValueError(f"{text[:80]!r} is not an octal mode such as 2770")
    return int(found[1], 8)
