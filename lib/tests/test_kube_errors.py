"""Answers of the API server as errors that a caller can act on."""

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from external_storage.kube import errors
from external_storage.kube.errors import Status, cut, from_response, from_status


def answer(**fields: object) -> bytes:
    return msgspec.json.encode({"kind": "Status", "apiVersion": "v1", **fields})


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (400, "BadRequest", errors.BadRequest),
        (401, "Unauthorized", errors.Unauthorized),
        (403, "Forbidden", errors.Forbidden),
        (404, "NotFound", errors.NotFound),
        (409, "Conflict", errors.Conflict),
        (409, "AlreadyExists", errors.AlreadyExists),
        (410, "Expired", errors.Gone),
        (410, "Gone", errors.Gone),
        (422, "Invalid", errors.Invalid),
        (429, "TooManyRequests", errors.TooManyRequests),
        (500, "InternalError", errors.ServerError),
        (504, "Timeout", errors.ServerError),
        (418, "", errors.StatusError),
    ],
)
def test_code_and_reason_choose_the_type(
    code: int, reason: str, kind: type[errors.StatusError]
) -> None:
    error = from_response(code, answer(message="why", reason=reason, code=code), retry_after_s=2.0)
    assert type(error) is kind
    assert (error.code, error.reason, error.retry_after_s) == (code, reason, 2.0)
    assert str(error) == f"{code} {reason or 'error'}: why"


def test_already_exists_is_a_conflict() -> None:
    assert issubclass(errors.AlreadyExists, errors.Conflict)


def test_the_error_event_of_a_watch_is_gone_when_its_version_expired() -> None:
    error = from_status(Status(message="too old", reason="Expired", code=410))
    assert isinstance(error, errors.Gone)


def test_a_patch_refused_for_its_uid_is_a_conflict() -> None:
    causes = [{"reason": "FieldValueInvalid", "message": "immutable", "field": "metadata.uid"}]
    body = answer(reason="Invalid", code=422, details={"causes": causes})
    assert type(from_response(422, body)) is errors.Conflict
    other = answer(reason="Invalid", code=422, details={"causes": [{"field": "spec.nfs"}]})
    assert type(from_response(422, other)) is errors.Invalid


@pytest.mark.parametrize("body", [b"<html>Bad Gateway</html>", b"[]", b"null", b"\xff\xfe", b""])
def test_an_answer_that_is_no_status_is_an_error_of_its_code(body: bytes) -> None:
    error = from_response(502, body)
    assert isinstance(error, errors.ServerError)
    assert str(error).startswith("502 error: ")


def test_the_code_of_the_response_wins_over_that_in_the_body() -> None:
    assert isinstance(from_response(404, answer(code=500)), errors.NotFound)


def test_the_text_is_one_line_of_at_most_256_characters() -> None:
    page = b"<html>\n" + b"long line\n" * 100_000
    text = str(from_response(503, page))
    assert len(text) == 256
    assert "\n" not in text
    assert text.startswith("503 error: <html> long line long line")
    assert text.endswith("…")


@given(st.text(), st.integers(1, 300))
def test_cut_gives_one_line_within_the_limit(text: str, limit: int) -> None:
    shortened = cut(text, limit)
    assert len(shortened) <= limit
    assert len(shortened.splitlines()) <= 1
    words = " ".join(text.split())
    assert shortened == words or words.startswith(shortened[:-1])


@given(st.integers(300, 599), st.binary())
@example(500, b'{"message": "\xff"}')
@example(500, b'{"message": "x", "details": ' + b"[" * 100_000)
def test_any_bytes_make_an_error_of_their_code(code: int, body: bytes) -> None:
    error = from_response(code, body)
    assert error.code == code
    assert len(str(error)) <= errors.MAX_TEXT
