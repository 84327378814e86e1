"""Text with fields that are filled in from a claim: paths of volumes, owners, modes.

A field is ``${.PVC.name}``, ``${.PVC.namespace}``, ``${.PVC.uid}``, ``${.PV.name}``,
``${.PVC.labels.KEY}`` or ``${.PVC.annotations.KEY}``; a KEY may have dots and a slash, as
Kubernetes allows. A label or annotation may be missing or empty: that is an error which names it,
unless the template says what to take instead: ``${.PVC.labels.team:-none}``.

Who writes the template is an admin; the values are any user's. So the text is parsed once, before
there is a claim, and filled in one pass: a value that looks like a field stays as it is. A value
may hold ``/``, because classes of nfs-subdir-external-provisioner rely on it; a path is checked as
a whole after it was filled, segment by segment, so that none can leave its base.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final, Self

from external_storage import confine
from external_storage.kube.types import PersistentVolumeClaim

FIELDS: Final = (
    "${.PVC.name}",
    "${.PVC.namespace}",
    "${.PVC.uid}",
    "${.PVC.labels.KEY}",
    "${.PVC.annotations.KEY}",
    "${.PV.name}",
)
"""What there is, as it is shown to who mistyped one."""

_OPEN = "${"
_PLAIN = (".PVC.name", ".PVC.namespace", ".PVC.uid", ".PV.name")
_KEYED = re.compile(r"\.PVC\.(labels|annotations)\.(.+)", re.ASCII | re.DOTALL)
# As Kubernetes has it: an optional DNS prefix and a slash before at most 63 characters.
_KEY = re.compile(r"([a-z0-9][-a-z0-9.]{0,252}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_SHOWN = 80


class BadTemplate(ValueError):
    """A template that cannot be used whatever the claim; the text says what is allowed."""


class BadExpansion(ValueError):
    """What a template gives for one claim cannot be used; the text names the field."""


@dataclass(frozen=True, slots=True)
class _Field:
    source: str
    """Without the braces: ``.PVC.labels.team``."""
    key: str = ""
    """Of a label or annotation."""
    default: str | None = None


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template; make it by ``parse``."""

    text: str
    parts: tuple[str | _Field, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ``BadTemplate``: an unknown field, one that is not closed, a bare ``$``."""
        return cls(text, tuple(_parse(text)))

    @property
    def is_constant(self) -> bool:
        """Whether it has no fields: every claim gets the same."""
        return not any(isinstance(part, _Field) for part in self.parts)

    def fill(self, claim: PersistentVolumeClaim, *, volume_name: str) -> str:
        """The text for one claim; ``BadExpansion`` names a label or annotation that is missing."""
        return "".join(
            part if isinstance(part, str) else _value(part, claim, volume_name)
            for part in self.parts
        )


@dataclass(frozen=True, slots=True)
class PathTemplate:
    """A template whose result is a path strictly below a base; make it by ``parse``."""

    template: Template
    reserved: frozenset[str] = frozenset()
    """First segments that are somebody else's, in lower case."""

    @classmethod
    def parse(cls, text: str, *, reserved: Collection[str] = ()) -> Self:
        """Raises ``BadTemplate``, also for what no claim could make a path of: ``/x``, ``a/../b``.

        ``reserved``: names right below the base that no path may begin with.
        """
        made = cls(Template.parse(text), frozenset(map(str.casefold, reserved)))
        # What is wrong with a harmless value for every field, or with the defaults, is wrong with
        # the template itself.
        for defaults in (False, True):
            try:
                made._check("".join(_example(part, defaults) for part in made.template.parts))
            except ValueError as error:
                raise BadTemplate(
                    f"{_shown(text)} cannot give a path below the base: {error}"
                ) from None
        return made

    def path(self, claim: PersistentVolumeClaim, *, volume_name: str) -> str:
        """The path for one claim: relative, of plain names, strictly below any base.

        Raises ``BadExpansion``: a key is missing, or the result has an empty segment, ``.``,
        ``..``, a control character, is too long, or begins with a reserved name.
        """
        filled = self.template.fill(claim, volume_name=volume_name)
        try:
            self._check(filled)
        except ValueError as error:
            raise BadExpansion(
                f"{_shown(self.template.text)} gives no usable path: {error}"
            ) from None
        return filled

    def _check(self, path: str) -> None:
        first = confine.check(path)[0]
        # In whatever case: the file system may not tell them apart.
        if first.casefold() in self.reserved:
            raise ValueError(f"{first!r} is reserved: want another first directory")


def _example(part: str | _Field, defaults: bool) -> str:
    if isinstance(part, str):
        return part
    return part.default if defaults and part.default is not None else "x"


def _parse(text: str) -> Iterator[str | _Field]:
    at = 0
    while at < len(text):
        begin = text.find("$", at)
        if begin < 0:
            yield text[at:]
            return
        if begin > at:
            yield text[at:begin]
        end = text.find("}", begin)
        if not text.startswith(_OPEN, begin) or end < 0:
            raise BadTemplate(
                f"{_shown(text)}: the $ at {begin} begins no field; there are {', '.join(FIELDS)}"
            )
        yield _field(text, text[begin + len(_OPEN) : end])
        at = end + 1


def _field(text: str, inside: str) -> _Field:
    source, has_default, default = inside.partition(":-")
    if "$" in inside:
        raise BadTemplate(f"{_shown(text)}: a field within a field is not possible")
    if source in _PLAIN:
        if has_default:
            raise BadTemplate(f"{_shown(text)}: ${{{source}}} is always there, it has no default")
        return _Field(source)
    keyed = _KEYED.fullmatch(source)
    if keyed is None:
        raise BadTemplate(
            f"{_shown(text)}: ${{{source}}} is not known; there are {', '.join(FIELDS)}"
        )
    if not _KEY.fullmatch(keyed[2]):
        raise BadTemplate(f"{_shown(text)}: {keyed[2]!r} is no key of a label or an annotation")
    return _Field(source, keyed[2], default if has_default else None)


def _value(field: _Field, claim: PersistentVolumeClaim, volume_name: str) -> str:
    match field.source:
        case ".PVC.name":
            return claim.name
        case ".PVC.namespace":
            return claim.namespace
        case ".PVC.uid":
            return claim.uid
        case ".PV.name":
            return volume_name
    labels = field.source.startswith(".PVC.labels.")
    value = (claim.metadata.labels if labels else claim.metadata.annotations).get(field.key, "")
    if value:
        return value
    if field.default is not None:
        return field.default
    kind = "label" if labels else "annotation"
    raise BadExpansion(
        f"the claim has no {kind} {field.key!r}, or an empty one, and the class needs it: "
        f"set it, or write a default as ${{{field.source}:-DEFAULT}} in the class"
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")
