"""Text into typed fields: what flags, environment variables and class parameters share.

A dataclass lists what may be set, with types, defaults and a docstring under each field. All
problems of one input are found before any is reported.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NewType

Seconds = NewType("Seconds", float)
"""A duration in seconds; as text a number with a unit (``90s``, ``1h30m``) or without one."""

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)(ms|s|m|h))", re.ASCII)
_LEADING_ZERO = re.compile(r"[+-]?0[0-9_]+", re.ASCII)
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_TRUE = {"true", "t", "1", "yes", "on"}
_FALSE = {"false", "f", "0", "no", "off"}


class Problems(Exception):
    """Everything that is wrong with one input; ``problems`` holds a sentence for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FieldInfo:
    """One field of a dataclass, as a person sees it."""

    name: str
    type: Any
    default: Any
    """``dataclasses.MISSING`` for a field that must be given."""
    doc: str

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def default_text(self) -> str:
        """The default as a person would write it; ``required`` where there is none."""
        if self.required:
            return "required"
        if self.type is Seconds:
            return f"{self.default:g}s"
        return to_text(self.default)

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return self.name.upper()

    @property
    def parameter(self) -> str:
        """The camelCase key of a class parameter."""
        head, *tail = self.name.split("_")
        return head + "".join(word.capitalize() for word in tail)


_known: dict[type, tuple[FieldInfo, ...]] = {}


def fields_of(cls: type) -> tuple[FieldInfo, ...]:
    """The fields of a dataclass in order, with the docstrings written under them."""
    if cls not in _known:
        _known[cls] = _read_fields(cls)
    return _known[cls]


def _read_fields(cls: Any) -> tuple[FieldInfo, ...]:  # noqa: ANN401  (a dataclass, to mypy)
    hints = typing.get_type_hints(cls)
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs |= _docstrings(base)
    found = []
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        doc = docs.get(field.name, "")
        found.append(FieldInfo(name=field.name, type=hints[field.name], default=default, doc=doc))
    return tuple(found)


def convert(kind: Any, text: str) -> Any:  # noqa: ANN401  (the type is data here)
    """``text`` as ``kind``; ``ValueError`` says what is allowed."""
    inner, optional = _unwrap(kind)
    if optional and text.strip().lower() in ("", "none"):
        return None
    if inner is Seconds:
        return _duration(text)
    if inner is bool:
        return _boolean(text)
    if inner is int:
        return _integer(text)
    if inner is float:
        return _float(text)
    if typing.get_origin(inner) is tuple:
        item = typing.get_args(inner)[0]
        return tuple(convert(item, part.strip()) for part in text.split(",") if part.strip())
    if isinstance(inner, type) and issubclass(inner, Enum):
        return _member(inner, text)
    if inner in (str, Path):
        return inner(text)
    raise TypeError(f"fields of type {kind} cannot be read from text")


def to_text(value: object) -> str:
    """A default as a person would write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(to_text(item) for item in value)
    if isinstance(value, Enum):
        return str(value.value)
    return str(value)


def build(cls: type, texts: Mapping[str, str], names: Mapping[str, str]) -> Any:  # noqa: ANN401
    """An instance of dataclass ``cls`` from texts by field name.

    Args:
        cls: a dataclass; if it has ``validate()``, that returns more problems, a sentence each.
        names: what a problem calls each field (a flag, a parameter key).

    Raises:
        Problems: with all of them, never only the first.
    """
    problems: list[str] = []
    bad: set[str] = set()
    values: dict[str, Any] = {}
    for info in fields_of(cls):
        label = names[info.name]
        if info.name not in texts:
            if info.required:
                bad.add(label)
                problems.append(f"{label}: must be given")
            continue
        try:
            values[info.name] = convert(info.type, texts[info.name])
        except ValueError as error:
            bad.add(label)
            problems.append(f"{label}: {error}")
    instance = None
    if not any(info.required and info.name not in values for info in fields_of(cls)):
        # Defaults stand in for what could not be read, so that the rest is checked all the same.
        instance = cls(**values)
        problems += [p for p in instance.validate() if not any(p.startswith(f"{b}:") for b in bad)]
    if problems:
        raise Problems(problems)
    return instance


def _unwrap(kind: Any) -> tuple[Any, bool]:  # noqa: ANN401
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        arms = [arm for arm in typing.get_args(kind) if arm is not types.NoneType]
        if len(arms) == 1:
            return arms[0], True
    return kind, False


def _duration(text: str) -> float:
    plain = text.strip()
    try:
        value = float(plain)
    except ValueError:
        parts = _DURATION.findall(plain)
        if not parts or "".join(number + unit for number, unit in parts) != plain:
            raise ValueError(
                f"{text!r} is not a duration: want 30s, 5m, 1h30m or seconds, from 0"
            ) from None
        value = sum(float(number) * _UNIT_S[unit] for number, unit in parts)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{text!r} is not a duration: want 30s, 5m, 1h30m or seconds, from 0")
    return value


def _boolean(text: str) -> bool:
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def _integer(text: str) -> int:
    if _LEADING_ZERO.fullmatch(text.strip()):
        # Meant as octal by some and as decimal by others: a wrong guess is a wrong file mode.
        raise ValueError(f"{text!r} begins with 0: write octal as 0o770, decimal without the 0")
    try:
        return int(text.strip(), 0 if text.strip().lower().startswith(("0o", "0x")) else 10)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


def _member(kind: type[Enum], text: str) -> Enum:
    for member in kind:
        if str(member.value).lower() == text.strip().lower():
            return member
    allowed = ", ".join(str(member.value) for member in kind)
    raise ValueError(f"{text!r} is not one of: {allowed}")


def _docstrings(cls: type) -> dict[str, str]:
    """The string literals under the fields of ``cls``: Python itself throws them away."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    body = ast.parse(source).body[0]
    if not isinstance(body, ast.ClassDef):
        return {}
    docs = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            docs[statement.target.id] = inspect.cleandoc(following.value.value)
    return docs
