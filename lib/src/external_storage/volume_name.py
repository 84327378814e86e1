"""The names of new volumes.

A template is text with ``${.PVC.uid}``, ``${.PVC.namespace}`` and ``${.PVC.name}``. The UID must be
in it: a claim of the same name may be made again while the volume of the first is still there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_LENGTH = 253
"""Characters in the name of a PersistentVolume."""

_FIELDS = ("namespace", "name", "uid")
_FIELD = re.compile(r"\$\{\.PVC\.([a-z]+)\}", re.ASCII)
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", re.ASCII)
_EXAMPLE = {"namespace": "default", "name": "data", "uid": "00000000-0000-4000-8000-000000000000"}


class BadVolumeName(ValueError):
    """The name that a template gives for a claim cannot be a volume's."""


def problems(template: str) -> Iterator[str]:
    """What is wrong with a template, a sentence each."""
    for field in _FIELD.findall(template):
        if field not in _FIELDS:
            known = ", ".join(f"${{.PVC.{known}}}" for known in _FIELDS)
            yield f"{template!r}: ${{.PVC.{field}}} is not known; there are {known}"
    rest = _FIELD.sub("x", template)
    if "${.PVC.uid}" not in template:
        yield f"{template!r} lacks ${{.PVC.uid}}, without which names would not be unique"
    elif "$" in rest:
        yield f"{template!r}: a $ begins no known field"
    elif not _NAME.fullmatch(rest):
        yield f"{template!r}: only a-z, 0-9, '-' and '.' may stand beside the fields"
    elif len(_fill(template, _EXAMPLE)) > MAX_LENGTH:
        yield f"{template!r} gives names longer than {MAX_LENGTH} characters"


def render(template: str, *, namespace: str, name: str, uid: str) -> str:
    """The name of a claim's volume; ``BadVolumeName`` if it cannot be one."""
    filled = _fill(template, {"namespace": namespace, "name": name, "uid": uid})
    if len(filled) > MAX_LENGTH:
        raise BadVolumeName(
            f"the volume's name would have {len(filled)} characters, {MAX_LENGTH} are allowed: "
            f"--volume-name-template is {template!r}"
        )
    if not _NAME.fullmatch(filled):
        raise BadVolumeName(f"{filled!r} is no name for a volume")
    return filled


def _fill(template: str, values: dict[str, str]) -> str:
    return _FIELD.sub(lambda match: values.get(match[1], ""), template)
