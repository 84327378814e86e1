"""Log lines: a constant message plus fields."""

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_storage.logs import LogFormat, configure, get_logger

log = get_logger("test.logs")


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """Where the lines go; the root logger is put back afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def only(stream: io.StringIO) -> Any:
    [line] = stream.getvalue().splitlines()
    return json.loads(line)


def test_a_text_line_is_time_level_logger_message_and_fields(lines: io.StringIO) -> None:
    configure(stream=lines)
    log.info("volume saved", volume="pvc-1", seconds=0.5)
    expected = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO test\.logs volume saved "
    assert re.fullmatch(expected + r"volume=pvc-1 seconds=0\.5\n", lines.getvalue())


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("two words", '"two words"'),
        ("", '""'),
        ("a=b", '"a=b"'),
        ('say "hi"', r'"say \"hi\""'),
        ("two\nlines", r'"two\nlines"'),
        ("\x1b[31m", r'"\u001b[31m"'),
        ("\ud800", r'"\ud800"'),
        (None, "None"),
        ("größe", "größe"),
    ],
)
def test_a_value_that_could_be_misread_is_quoted(
    lines: io.StringIO, value: object, shown: str
) -> None:
    configure(stream=lines)
    log.info("x", field=value)
    assert lines.getvalue().endswith(f" x field={shown}\n")


def test_a_json_line_has_message_and_fields_apart(lines: io.StringIO) -> None:
    configure(format=LogFormat.JSON, stream=lines)
    log.warning("volume not saved", volume="pvc-1", tries=3)
    line = only(lines)
    assert line.pop("ts").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "test.logs",
        "msg": "volume not saved",
        "volume": "pvc-1",
        "tries": 3,
    }


def test_json_writes_what_it_does_not_know_as_text(lines: io.StringIO) -> None:
    configure(format=LogFormat.JSON, stream=lines)
    log.info("x", path=ValueError("odd"))
    assert only(lines)["path"] == "odd"


@pytest.mark.parametrize("format", LogFormat)
def test_a_message_is_never_taken_for_a_template(lines: io.StringIO, format: LogFormat) -> None:
    configure(format=format, stream=lines)
    log.info("100 % of %s", a="%d")
    assert "100 % of %s" in lines.getvalue()


def test_bind_carries_fields_along_and_leaves_the_first_logger_alone(lines: io.StringIO) -> None:
    configure(format=LogFormat.JSON, stream=lines)
    bound = log.bind(claim="default/data", attempt=1)
    bound.bind(attempt=2).info("x", volume="pvc-1")
    line = only(lines)
    assert (line["claim"], line["attempt"], line["volume"]) == ("default/data", 2, "pvc-1")
    log.info("y")
    assert "claim" not in lines.getvalue().splitlines()[1]


@pytest.mark.parametrize("format", LogFormat)
def test_exception_adds_the_traceback(lines: io.StringIO, format: LogFormat) -> None:
    configure(format=format, stream=lines)
    try:
        raise RuntimeError("a defect")
    except RuntimeError:
        log.exception("it failed", volume="pvc-1")
    assert "Traceback" in lines.getvalue()
    assert "RuntimeError: a defect" in lines.getvalue()


def test_exception_takes_an_error_that_is_no_longer_handled(lines: io.StringIO) -> None:
    configure(format=LogFormat.JSON, stream=lines)
    log.exception("it failed", exc=RuntimeError("a defect"))
    assert only(lines)["exception"].endswith("RuntimeError: a defect")


def test_lines_below_the_level_are_not_written(lines: io.StringIO) -> None:
    configure(level="warning", stream=lines)
    log.debug("debug")
    log.info("info")
    assert lines.getvalue() == ""
    log.warning("warning")
    log.error("error")
    assert len(lines.getvalue().splitlines()) == 2


def test_lines_of_other_libraries_come_in_the_same_format(lines: io.StringIO) -> None:
    configure(format=LogFormat.JSON, stream=lines)
    logging.getLogger("other").info("hello %s", "world")
    assert only(lines)["msg"] == "hello world"


def test_configuring_twice_writes_each_line_once(lines: io.StringIO) -> None:
    configure(stream=lines)
    configure(stream=lines)
    log.info("x")
    assert len(lines.getvalue().splitlines()) == 1


def test_a_field_never_replaces_a_part_of_the_line(lines: io.StringIO) -> None:
    configure(format=LogFormat.JSON, stream=lines)
    log.error("it failed", level="raid5", msg="boom")
    assert (only(lines)["level"], only(lines)["msg"]) == ("error", "it failed")


@given(st.dictionaries(st.from_regex(r"f_[a-z]{1,5}", fullmatch=True), st.text()))
def test_any_fields_make_one_line_that_is_read_back_as_json(fields: dict[str, str]) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    try:
        configure(format=LogFormat.JSON, stream=stream)
        log.info("x", **fields)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    [line] = stream.getvalue().split("\n")[:-1]
    assert {k: v for k, v in json.loads(line).items() if k.startswith("f_")} == fields
