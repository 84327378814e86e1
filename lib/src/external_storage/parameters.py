"""The parameters of a class, checked as a whole before a backend is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Self, dataclass_transform

from external_storage.fields import Problems, build, fields_of


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """Base of a provisioner's class parameters.

    Each annotated field is a key: ``root_squash: bool = False`` is ``rootSquash``. Keys are
    compared without regard to case; unknown keys are refused, because a mistyped one would silently
    give a user another volume than the class promises.

    Field types: ``str``, ``int``, ``float``, ``bool``, ``Path``, ``Seconds``, a ``StrEnum``,
    ``tuple[...]`` of one of them (comma-separated), or any of these ``| None``.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    @classmethod
    def from_class(cls, parameters: Mapping[str, str]) -> Self:
        """Read the ``parameters`` of a StorageClass.

        Raises:
            Problems: unknown keys (with the keys allowed), keys given twice, bad values; all at
                once.
        """
        known = {info.parameter.lower(): info for info in fields_of(cls)}
        texts: dict[str, str] = {}
        problems: list[str] = []
        for key, value in parameters.items():
            info = known.get(key.lower())
            if info is None:
                problems.append(f"unknown parameter {key!r}")
            elif info.name in texts:
                problems.append(f"parameter {info.parameter!r} is given twice")
            else:
                texts[info.name] = value
        if problems:
            allowed = ", ".join(sorted(info.parameter for info in known.values())) or "none"
            problems.append(f"allowed parameters: {allowed}")
        names = {info.name: f"parameter {info.parameter!r}" for info in known.values()}
        try:
            built: Self = build(cls, texts, names)
        except Problems as error:
            problems = [*error.problems, *problems]
        if problems:
            raise Problems(problems)
        return built

    @classmethod
    def unknown_keys(cls, parameters: Mapping[str, str]) -> list[str]:
        """The keys of ``parameters`` that no field has."""
        known = {info.parameter.lower() for info in fields_of(cls)}
        return [key for key in parameters if key.lower() not in known]

    def validate(self) -> Iterable[str]:
        """What is wrong with the values together, a sentence for each problem; override it."""
        return ()


class NoParameters(Parameters):
    """For provisioners whose classes take no parameters."""
