"""Reads typed values out of YAML mappings and gathers what is wrong, each with its place."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Any, TypeVar

from external_storage import Seconds
from external_storage.fields import convert

E = TypeVar("E", bound=StrEnum)

_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", re.ASCII)
_LABEL_KEY = re.compile(
    r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?",
    re.ASCII,
)
_OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt")


class Reader:
    """One mapping; ask for each key there may be, then ``finish``."""

    def __init__(self, values: Mapping[str, Any], where: str, problems: list[str]) -> None:
        self._where = where
        self._problems = problems
        self._asked: dict[str, str] = {}
        self._values: dict[str, Any] = {}
        for key, value in values.items():
            if str(key).lower() in self._values:
                self.problem(f"{key}: is there twice, in different letter case")
            self._values[str(key).lower()] = value
        self._names = {str(key).lower(): str(key) for key in values}

    def problem(self, text: str) -> None:
        """Note what is wrong; ``text`` begins with the key."""
        self._problems.append(f"{self._where}.{text}" if self._where else text)

    def finish(self, *, ignored: Collection[str] = (), unreadable: Collection[str] = ()) -> None:
        """Name the keys that nobody has asked for; ``unreadable`` ones have been told of."""
        known = [*self._asked.values(), *ignored]
        for key, name in self._names.items():
            if key not in {k.lower() for k in known} and name not in unreadable:
                self.problem(f"{name}: is not a key; there are: {', '.join(sorted(known))}")

    def text(self, key: str) -> str:
        value = self._get(key)
        if value is None:
            return ""
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value).strip()
        self.problem(f"{key}: want a text, got {_kind(value)}")
        return ""

    def boolean(self, key: str) -> bool:
        value = self._get(key)
        if isinstance(value, bool) or value is None:
            return bool(value)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            # The text of a ConfigMap is often quoted twice.
            return value.lower() == "true"
        self.problem(f"{key}: {value!r} is neither true nor false")
        return False

    def seconds(self, key: str, default: float) -> float:
        text = self.text(key)
        if not text:
            return default
        try:
            return float(convert(Seconds, text))
        except ValueError as error:
            self.problem(f"{key}: {error}")
            return default

    def member(self, key: str, kind: type[E], default: E) -> E:
        text = self.text(key)
        try:
            return kind(text) if text else default
        except ValueError:
            self.problem(f"{key}: {text!r} is not one of: {', '.join(kind)}")
            return default

    def texts(self, key: str, *, may_be_empty: bool = True) -> tuple[str, ...]:
        """A list of texts; none for a key that is not there."""
        value = self._get(key)
        if value is None and (may_be_empty or key.lower() not in self._values):
            return ()
        if not isinstance(value, list) or not all(isinstance(v, str | int) for v in value):
            self.problem(f"{key}: want a list of texts, got {_kind(value)}")
            return ()
        if not value and not may_be_empty:
            self.problem(f"{key}: is an empty list; leave the key out for the default")
        return tuple(str(item) for item in value)

    def labels(self, key: str) -> dict[str, str]:
        found = {}
        for name, value in self._mapping(key).items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            if not _LABEL_KEY.fullmatch(str(name)) or not _LABEL_VALUE.fullmatch(text):
                self.problem(f"{key}: {name}={text} is not a label")
            found[str(name)] = text
        return found

    def children(self, key: str) -> dict[str, Reader]:
        """A reader for each mapping in a mapping."""
        found = {}
        for name, value in self._mapping(key).items():
            where = f"{self._where}.{key}.{name}".lstrip(".")
            if not isinstance(value, dict):
                self.problem(f"{key}.{name}: want keys such as hostDir, got {_kind(value)}")
                continue
            found[str(name)] = Reader(value, where, self._problems)
        return found

    def node_selector_terms(self, key: str) -> tuple[Mapping[str, Any], ...]:
        """NodeSelectorTerms as the API has them; what the API server would refuse is named."""
        value = self._get(key) or []
        if not isinstance(value, list):
            self.problem(f"{key}: want a list of node selector terms, got {_kind(value)}")
            return ()
        for number, term in enumerate(value):
            where = f"{key}[{number}]"
            if not isinstance(term, dict) or not term.keys() <= {"matchExpressions", "matchFields"}:
                self.problem(f"{where}: want matchExpressions or matchFields")
                continue
            for item in (item for items in term.values() for item in items or ()):
                if not isinstance(item, dict) or item.get("operator") not in _OPERATORS:
                    self.problem(f"{where}: want key, operator ({', '.join(_OPERATORS)}), values")
        return tuple(term for term in value if isinstance(term, dict))

    def _mapping(self, key: str) -> Mapping[Any, Any]:
        value = self._get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.problem(f"{key}: want a mapping, got {_kind(value)}")
            return {}
        return value

    def _get(self, key: str) -> Any:  # noqa: ANN401
        self._asked[key.lower()] = key
        return self._values.get(key.lower())


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "a text", bool: "a boolean"}
    return "nothing" if value is None else names.get(type(value), "a number")
