"""Events: what ``kubectl describe`` shows."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from external_storage import events
from external_storage.events import MAX_MESSAGE, EventRecorder
from external_storage.kube.client import Client
from external_storage.kube.errors import (
    AlreadyExists,
    Forbidden,
    KubeError,
    NotFound,
    ServerError,
    Unavailable,
)
from external_storage.kube.request import STRATEGIC_PATCH
from external_storage.testing.builders import Clock, claim, volume
from external_storage.workqueue import Backoff

PATIENCE_S = 20.0
START = 1_767_225_600.0  # 2026-01-01T00:00:00Z


class Server:
    """Holds events by name. ``answers`` are the errors of the next requests; ``gate`` holds up
    each request until it is set."""

    def __init__(self) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        self.answers: list[KubeError | Exception] = []
        self.requests: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.asked = threading.Event()

    def create(self, _kind: object, fields: dict[str, Any], *, namespace: str = "") -> None:
        self._answer("create")
        assert fields["metadata"]["namespace"] == namespace
        self.events[fields["metadata"]["name"]] = fields

    def patch(
        self, _kind: object, name: str, patch: dict[str, Any], *, namespace: str, content_type: str
    ) -> None:
        self._answer("patch")
        assert content_type == STRATEGIC_PATCH
        if name not in self.events:
            raise NotFound("no", code=404)
        assert self.events[name]["metadata"]["namespace"] == namespace
        self.events[name].update(patch)

    def _answer(self, what: str) -> None:
        self.requests.append(what)
        self.asked.set()
        self.gate.wait(PATIENCE_S)
        if self.answers:
            raise self.answers.pop(0)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def clock() -> Clock:
    return Clock(START)


@pytest.fixture
def drops() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def no_pause_between_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_BACKOFF", Backoff(start_s=0.0, max_s=0.0))


@pytest.fixture
def recorder(server: Server, clock: Clock, drops: list[str]) -> Iterator[EventRecorder]:
    """Not started: what is recorded waits until ``written``."""
    recorder = EventRecorder(
        cast("Client", server),
        "example.com/test",
        on_drop=lambda: drops.append("x"),
        clock=clock,
    )
    yield recorder
    server.gate.set()
    recorder.stop(0.0)


def written(recorder: EventRecorder) -> None:
    if not recorder._thread.is_alive():
        recorder.start()
    assert recorder.flush(PATIENCE_S)


def only(server: Server) -> dict[str, Any]:
    [event] = server.events.values()
    return event


def test_an_event_says_what_happened_to_what(recorder: EventRecorder, server: Server) -> None:
    recorder.warning(claim(resource_version="7"), "ProvisioningFailed", "no space left")
    written(recorder)
    event = only(server)
    assert event.pop("metadata")["namespace"] == "default"
    assert event == {
        "involvedObject": {
            "kind": "PersistentVolumeClaim",
            "apiVersion": "v1",
            "namespace": "default",
            "name": "data",
            "uid": claim().uid,
            "resourceVersion": "7",
        },
        "type": "Warning",
        "reason": "ProvisioningFailed",
        "message": "no space left",
        "count": 1,
        "firstTimestamp": "2026-01-01T00:00:00Z",
        "lastTimestamp": "2026-01-01T00:00:00Z",
        "source": {"component": "example.com/test"},
        "reportingComponent": "example.com/test",
        "reportingInstance": "example.com/test",
    }


def test_an_event_about_a_volume_goes_to_the_default_namespace(
    recorder: EventRecorder, server: Server
) -> None:
    recorder.normal(volume(), "VolumeInUse", "a pod uses it")
    written(recorder)
    assert only(server)["metadata"]["namespace"] == "default"
    assert "namespace" not in only(server)["involvedObject"]


def test_an_event_that_repeats_raises_the_count_of_the_one_that_is_there(
    recorder: EventRecorder, server: Server, clock: Clock
) -> None:
    for _ in range(3):
        recorder.warning(claim(), "Failed", "why")
        written(recorder)
        clock.advance(60)
    assert server.requests == ["create", "patch", "patch"]
    event = only(server)
    assert event["count"] == 3
    assert event["firstTimestamp"] == "2026-01-01T00:00:00Z"
    assert event["lastTimestamp"] == "2026-01-01T00:02:00Z"


def test_events_that_repeat_while_they_wait_are_written_once(
    recorder: EventRecorder, server: Server
) -> None:
    for _ in range(100):
        recorder.warning(claim(), "Failed", "why")
    written(recorder)
    assert server.requests == ["create"]
    assert only(server)["count"] == 100


def test_events_that_differ_are_kept_apart(recorder: EventRecorder, server: Server) -> None:
    recorder.normal(claim(), "Failed", "why")
    recorder.warning(claim(), "Failed", "why")
    recorder.warning(claim(), "Failed", "why else")
    recorder.warning(claim(), "Else", "why")
    recorder.warning(claim(uid="made again"), "Failed", "why")
    written(recorder)
    assert len(server.events) == 5


def test_a_repetition_of_an_expired_event_begins_a_new_one(
    recorder: EventRecorder, server: Server
) -> None:
    recorder.normal(claim(), "Reason", "text")
    written(recorder)
    server.events.clear()
    recorder.normal(claim(), "Reason", "text")
    written(recorder)
    assert only(server)["count"] == 2
    assert server.requests == ["create", "patch", "create"]


def test_a_long_message_is_cut(recorder: EventRecorder, server: Server) -> None:
    recorder.normal(claim(), "Reason", "x" * (MAX_MESSAGE + 1))
    recorder.normal(claim(), "Reason", "y" * MAX_MESSAGE)
    written(recorder)
    messages = sorted(event["message"] for event in server.events.values())
    assert messages == ["x" * (MAX_MESSAGE - 1) + "…", "y" * MAX_MESSAGE]


def test_recording_never_waits_for_the_api_server(recorder: EventRecorder, server: Server) -> None:
    server.gate.clear()
    recorder.start()
    recorder.normal(claim(), "First", "held up in its request")
    assert server.asked.wait(PATIENCE_S)
    recorder.normal(claim(), "Second", "text")
    assert server.events == {}
    assert not recorder.flush(0.0)
    server.gate.set()
    written(recorder)
    assert len(server.events) == 2


@pytest.mark.parametrize("error", [Unavailable("down"), ServerError("no", code=503)])
def test_an_event_is_written_once_the_api_server_is_back(
    recorder: EventRecorder, server: Server, drops: list[str], error: KubeError
) -> None:
    server.answers = [error] * 4
    recorder.normal(claim(), "Reason", "text")
    written(recorder)
    assert only(server)["count"] == 1
    assert drops == []


def test_an_event_is_dropped_and_counted_after_five_tries(
    recorder: EventRecorder, server: Server, drops: list[str]
) -> None:
    server.answers = [ServerError("ill", code=500)] * 5
    recorder.normal(claim(), "Reason", "text")
    written(recorder)
    assert (server.events, len(server.requests), len(drops)) == ({}, 5, 1)


def test_an_event_outlasts_an_outage_of_any_length(
    recorder: EventRecorder, server: Server, drops: list[str]
) -> None:
    server.answers = [Unavailable("down")] * 50
    recorder.normal(claim(), "Reason", "text")
    written(recorder)
    assert (len(server.events), len(server.requests), drops) == (1, 51, [])


def test_an_event_whose_first_answer_was_lost_counts_as_written(
    recorder: EventRecorder, server: Server, drops: list[str]
) -> None:
    server.answers = [AlreadyExists("it is there", code=409)]
    recorder.normal(claim(), "Reason", "text")
    written(recorder)
    assert (len(server.requests), drops) == (1, [])


def test_an_event_that_was_dropped_once_is_given_all_its_tries_again(
    recorder: EventRecorder, server: Server
) -> None:
    server.answers = [ServerError("ill", code=500)] * 5
    recorder.normal(claim(), "Reason", "text")
    written(recorder)
    server.answers = [ServerError("ill", code=500)]
    recorder.normal(claim(), "Reason", "text")
    written(recorder)
    assert len(server.events) == 1


@pytest.mark.parametrize("error", [Forbidden("no", code=403), TypeError("a defect")])
def test_an_event_that_cannot_be_written_is_dropped_and_holds_up_no_other(
    recorder: EventRecorder, server: Server, drops: list[str], error: Exception
) -> None:
    server.answers = [error]
    recorder.normal(claim(), "First", "text")
    recorder.normal(claim(), "Second", "text")
    written(recorder)
    assert only(server)["reason"] == "Second"
    assert len(drops) == 1


def test_events_above_the_limit_are_dropped_and_counted(
    recorder: EventRecorder, server: Server, drops: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_MAX_PENDING", 2)
    for reason in ("A", "B", "C", "D"):
        recorder.normal(claim(), reason, "text")
    recorder.normal(claim(), "A", "text")
    written(recorder)
    counts = {event["reason"]: event["count"] for event in server.events.values()}
    assert counts == {"A": 2, "B": 1}
    assert len(drops) == 2


def test_no_repetition_is_lost_when_more_events_wait_than_are_remembered(
    recorder: EventRecorder, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_REMEMBERED", 2)
    for reason in ("A", "B", "C", "A"):
        recorder.normal(claim(), reason, "text")
    written(recorder)
    assert sum(event["count"] for event in server.events.values()) == 4


@pytest.mark.parametrize(
    "name",
    [
        "data",
        "a" * 253,
        "a" * 199 + "-" + "b" * 20,
    ],
)
def test_the_name_of_an_event_is_one_that_the_api_takes(
    recorder: EventRecorder, server: Server, name: str
) -> None:
    recorder.normal(claim(name=name), "Reason", "text")
    written(recorder)
    [given] = server.events
    assert len(given) <= 253
    label = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
    assert re.fullmatch(rf"{label}(\.{label})*", given)


@contextmanager
def stopping(recorder: EventRecorder) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=recorder.stop, args=(PATIENCE_S,), daemon=True)
    thread.start()
    yield thread
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_stop_writes_what_is_pending(recorder: EventRecorder, server: Server) -> None:
    server.gate.clear()
    recorder.start()
    recorder.normal(claim(), "First", "text")
    recorder.normal(claim(), "Second", "text")
    with stopping(recorder):
        server.gate.set()
    assert len(server.events) == 2
    assert not recorder._thread.is_alive()


def test_what_stop_could_not_write_in_time_is_counted_as_dropped(
    recorder: EventRecorder, server: Server, drops: list[str]
) -> None:
    server.gate.clear()
    recorder.start()
    recorder.normal(claim(), "First", "held up in its request")
    assert server.asked.wait(PATIENCE_S)
    recorder.normal(claim(), "Second", "never asked for")
    recorder.stop(0.0)
    server.gate.set()
    recorder._thread.join(PATIENCE_S)
    assert len(drops) + len(server.events) == 2
