"""Text into typed fields."""

import dataclasses
import math
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_storage.fields import Problems, Seconds, build, convert, fields_of, to_text


class Colour(StrEnum):
    RED = "red"
    DARK_BLUE = "darkBlue"


KINDS: tuple[Any, ...] = (
    str,
    int,
    float,
    bool,
    Path,
    Seconds,
    Colour,
    tuple[str, ...],
    tuple[int, ...],
    int | None,
    Colour | None,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    root: str
    """Where the volumes are;
    absolute."""

    worker_threads: int = 4
    """How many."""

    root_squash: bool = False
    names: tuple[str, ...] = dataclasses.field(default_factory=tuple)

    def validate(self) -> Iterable[str]:
        if self.worker_threads > 10:
            yield "--worker-threads: is above 10"
        if self.root_squash and not self.root:
            yield "--root-squash: needs a root"


FLAGS = {info.name: info.flag for info in fields_of(Example)}


def problems_of(texts: dict[str, str]) -> list[str]:
    with pytest.raises(Problems) as caught:
        build(Example, texts, FLAGS)
    return caught.value.problems


# -- one value


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("1.5", 1.5),
        ("90s", 90),
        (" 5m ", 300),
        ("1h30m", 5400),
        ("1h0m0.5s", 3600.5),
        ("250ms", 0.25),
        ("1m500ms", 60.5),
    ],
)
def test_a_duration_is_a_number_with_or_without_units(text: str, seconds: float) -> None:
    assert convert(Seconds, text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "s", "5 m", "1d", "-1s", "-1", "nan", "inf", "1e400", "5m3", "1h,2m", "٣s"]
)
def test_what_is_not_a_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration: want 30s, 5m, 1h30m or seconds"):
        convert(Seconds, text)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (str, " as it is ", " as it is "),
        (int, " 42 ", 42),
        (int, "-1", -1),
        (int, "0o770", 0o770),
        (int, "0xff", 255),
        (float, "2.5", 2.5),
        (bool, "TRUE", True),
        (bool, "off", False),
        (Path, "/srv", Path("/srv")),
        (Colour, "DARKBLUE", Colour.DARK_BLUE),
        (tuple[str, ...], "a, b,,c", ("a", "b", "c")),
        (tuple[int, ...], "", ()),
        (int | None, "none", None),
        (int | None, "", None),
        (int | None, "7", 7),
    ],
)
def test_text_becomes_a_value_of_the_type(kind: Any, text: str, value: object) -> None:
    assert convert(kind, text) == value


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        (int, "4.0", "'4.0' is not a whole number"),
        (int, "", "'' is not a whole number"),
        (float, "x", "'x' is not a number"),
        (bool, "maybe", "'maybe' is neither true nor false"),
        (Colour, "green", "'green' is not one of: red, darkBlue"),
        (tuple[int, ...], "1,x", "'x' is not a whole number"),
    ],
)
def test_the_error_says_what_is_allowed(kind: Any, text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        convert(kind, text)


@given(st.sampled_from(KINDS), st.text())
def test_no_text_raises_anything_but_a_value_error(kind: Any, text: str) -> None:
    try:
        value = convert(kind, text)
    except ValueError:
        return
    assert kind is not Seconds or 0 <= value < math.inf


@given(st.one_of(st.integers(), st.booleans(), st.sampled_from(Colour), st.floats(0, 1e9)))
def test_a_default_shown_in_help_is_read_back_as_itself(value: object) -> None:
    kind = Seconds if isinstance(value, float) else type(value)
    assert convert(kind, to_text(value)) == value


def test_no_default_is_shown_as_none() -> None:
    assert to_text(None) == "none"
    assert to_text(("a", Colour.RED)) == "a,red"


def test_an_octal_mode_of_old_is_not_taken_for_a_decimal_number() -> None:
    """``mode: "0770"`` in a class: 770 would be 0o1402. Read it as octal or refuse it."""
    try:
        mode = convert(int, "0770")
    except ValueError:
        return
    assert mode == 0o770


def test_a_type_that_cannot_be_read_from_text_is_the_authors_mistake() -> None:
    with pytest.raises(TypeError, match="cannot be read from text"):
        convert(dict[str, str], "x")


# -- the fields of a dataclass


def test_fields_come_in_order_with_the_docstrings_under_them() -> None:
    docs = {info.name: info.doc for info in fields_of(Example)}
    assert docs == {
        "root": "Where the volumes are;\nabsolute.",
        "worker_threads": "How many.",
        "root_squash": "",
        "names": "",
    }


def test_a_field_has_a_flag_a_variable_and_a_parameter() -> None:
    info = fields_of(Example)[1]
    assert (info.flag, info.env, info.parameter) == (
        "--worker-threads",
        "WORKER_THREADS",
        "workerThreads",
    )


def test_only_a_field_without_default_is_required() -> None:
    assert [info.name for info in fields_of(Example) if info.required] == ["root"]


# -- a whole instance


def test_an_instance_is_built_from_texts_and_defaults() -> None:
    built = build(Example, {"root": "/srv", "root_squash": "yes"}, FLAGS)
    assert built == Example(root="/srv", root_squash=True)


def test_all_problems_are_found_before_any_is_reported() -> None:
    texts = {"worker_threads": "many", "root_squash": "perhaps"}
    assert problems_of(texts) == [
        "--root: must be given",
        "--worker-threads: 'many' is not a whole number",
        "--root-squash: 'perhaps' is neither true nor false",
    ]


def test_what_validate_finds_is_reported_with_the_rest() -> None:
    texts = {"root": "/srv", "worker_threads": "11", "root_squash": "perhaps"}
    assert problems_of(texts) == [
        "--root-squash: 'perhaps' is neither true nor false",
        "--worker-threads: is above 10",
    ]


def test_no_field_is_complained_about_twice() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Strict:
        size: int = 0

        def validate(self) -> Iterable[str]:
            yield "--size: must be above 0"

    with pytest.raises(Problems) as caught:
        build(Strict, {"size": "big"}, {"size": "--size"})
    assert caught.value.problems == ["--size: 'big' is not a whole number"]


def test_a_bad_field_hides_no_problem_of_a_field_whose_name_begins_alike() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Alike:
        root: int = 0
        root_squash: bool = False

        def validate(self) -> Iterable[str]:
            yield "--root-squash: cannot be had here"

    with pytest.raises(Problems) as caught:
        build(Alike, {"root": "x"}, {"root": "--root", "root_squash": "--root-squash"})
    assert len(caught.value.problems) == 2


@given(st.dictionaries(st.sampled_from(list(FLAGS)), st.text()))
def test_any_texts_give_an_instance_or_named_problems(texts: dict[str, str]) -> None:
    found: list[str] = []
    built = None
    try:
        built = build(Example, texts, FLAGS)
    except Problems as error:
        found = error.problems
    assert isinstance(built, Example) != bool(found)
    assert all(problem.startswith("--") for problem in found)
