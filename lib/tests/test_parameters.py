"""The parameters of a class."""

from collections.abc import Iterable
from enum import StrEnum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_storage.fields import Problems
from external_storage.parameters import NoParameters, Parameters


class Squash(StrEnum):
    NONE = "none"
    ROOT = "root"


class NfsParameters(Parameters):
    export_path: str
    root_squash: bool = False
    gid: int | None = None
    squash: Squash = Squash.NONE
    mount_options: tuple[str, ...] = ()

    def validate(self) -> Iterable[str]:
        if self.gid is not None and self.gid < 0:
            yield "parameter 'gid': must not be negative"


def problems_of(parameters: dict[str, str]) -> list[str]:
    with pytest.raises(Problems) as caught:
        NfsParameters.from_class(parameters)
    return caught.value.problems


def test_parameters_are_read_by_their_camel_case_keys() -> None:
    parameters = {"exportPath": "/a", "rootSquash": "true", "mountOptions": "ro, hard"}
    assert NfsParameters.from_class(parameters) == NfsParameters(
        export_path="/a", root_squash=True, mount_options=("ro", "hard")
    )


def test_keys_are_compared_without_regard_to_case() -> None:
    assert NfsParameters.from_class({"EXPORTpath": "/a"}).export_path == "/a"


def test_an_unknown_key_is_refused_with_the_keys_allowed() -> None:
    assert problems_of({"exportPath": "/a", "rootsquach": "true"}) == [
        "unknown parameter 'rootsquach'",
        "allowed parameters: exportPath, gid, mountOptions, rootSquash, squash",
    ]


def test_a_key_given_twice_is_refused() -> None:
    found = problems_of({"exportPath": "/a", "gid": "1", "GID": "2"})
    assert found[0] == "parameter 'gid' is given twice"


def test_a_required_key_must_be_given() -> None:
    assert problems_of({}) == ["parameter 'exportPath': must be given"]


def test_all_problems_come_at_once() -> None:
    found = problems_of({"gid": "x", "squash": "all", "other": ""})
    assert found[:4] == [
        "parameter 'exportPath': must be given",
        "parameter 'gid': 'x' is not a whole number",
        "parameter 'squash': 'all' is not one of: none, root",
        "unknown parameter 'other'",
    ]


def test_values_are_checked_together() -> None:
    assert problems_of({"exportPath": "/a", "gid": "-1"}) == [
        "parameter 'gid': must not be negative"
    ]


def test_no_parameters_refuses_every_key() -> None:
    assert NoParameters.from_class({}) == NoParameters()
    with pytest.raises(Problems, match="unknown parameter 'a'; allowed parameters: none"):
        NoParameters.from_class({"a": "b"})


def test_the_base_itself_takes_no_parameters() -> None:
    """``Provisioner[MySettings, Parameters]`` type-checks, and is what a hurried author writes."""
    assert isinstance(Parameters.from_class({}), Parameters)


KEYS = st.sampled_from(["exportPath", "rootSquash", "GID", "gid", "squash", "mountOptions"])


@given(st.dictionaries(KEYS | st.text(), st.text()))
def test_any_class_gives_parameters_or_problems(parameters: dict[str, str]) -> None:
    found: list[str] = []
    built = None
    try:
        built = NfsParameters.from_class(parameters)
    except Problems as error:
        found = error.problems
    assert isinstance(built, NfsParameters) != bool(found)
