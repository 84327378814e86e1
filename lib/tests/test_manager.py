"""Parts that are started in order and stopped in reverse."""

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from external_storage import CannotStart
from external_storage import manager as manager_module
from external_storage.kube.auth import ClientConfig, NoToken
from external_storage.kube.types import PersistentVolume
from external_storage.manager import Manager
from external_storage.parameters import NoParameters
from external_storage.provisioner import ProvisionedVolume, Provisioner, ProvisionRequest
from external_storage.settings import Settings
from external_storage.testing.builders import Clock

PATIENCE_S = 20.0


class Parts:
    """Makes parts that note what happens to them."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.notes: list[str] = []

    def add(
        self,
        name: str,
        *,
        start: Callable[[], None] = lambda: None,
        stop: Callable[[float], object] = lambda _left: None,
    ) -> None:
        def begin() -> None:
            self.notes.append(f"start {name}")
            start()

        def end(left: float) -> object:
            self.notes.append(f"stop {name}")
            return stop(left)

        self.manager.add(name, begin, end)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(manager_module, "time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def parts() -> Parts:
    return Parts(Manager(stop_timeout_s=10.0))


def fail() -> None:
    raise OSError("no such backend")


def fail_to_stop(_left: float) -> None:
    fail()


# -- parts


def test_parts_start_in_order_and_stop_in_reverse(parts: Parts) -> None:
    for name in "abc":
        parts.add(name)
    parts.manager.start()
    assert parts.manager.stop()
    assert parts.notes == ["start a", "start b", "start c", "stop c", "stop b", "stop a"]


def test_a_part_that_cannot_start_stops_those_before_it_and_raises(parts: Parts) -> None:
    parts.add("a")
    parts.add("b")
    parts.add("c", start=fail)
    parts.add("d")
    with pytest.raises(OSError, match="no such backend"):
        parts.manager.start()
    assert parts.notes[:3] == ["start a", "start b", "start c"]
    assert parts.notes[-2:] == ["stop b", "stop a"]
    assert not any(note.endswith(" d") for note in parts.notes)


def test_an_error_in_stopping_does_not_hide_the_one_in_starting(parts: Parts) -> None:
    parts.add("a", stop=fail_to_stop)

    def defect() -> None:
        raise RuntimeError("the cause")

    parts.add("b", start=defect)
    with pytest.raises(RuntimeError, match="the cause"):
        parts.manager.start()


def test_an_interrupt_during_the_start_stops_what_was_started(parts: Parts) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    parts.add("a")
    parts.add("b", start=interrupt)
    with pytest.raises(KeyboardInterrupt):
        parts.manager.start()
    assert parts.notes[-1] == "stop a"


def test_stop_shares_out_the_seconds_it_may_take(parts: Parts, clock: Clock) -> None:
    given: list[float] = []

    def takes(seconds: float) -> Callable[[float], None]:
        def stop(left: float) -> None:
            given.append(left)
            clock.advance(seconds)

        return stop

    for name, seconds in (("a", 1.0), ("b", 5.0), ("c", 8.0), ("d", 0.0)):
        parts.add(name, stop=takes(seconds))
    parts.manager.start()
    parts.manager.stop()
    assert given == [10.0, 10.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("stop", "clean"),
    [
        (lambda _: None, True),
        (lambda _: True, True),
        (lambda _: False, False),
        (fail_to_stop, False),
    ],
)
def test_stop_is_clean_only_if_no_part_was_cut_off(
    parts: Parts, stop: Callable[[float], object], clean: bool
) -> None:
    parts.add("a")
    parts.add("b", stop=stop)
    parts.add("c")
    parts.manager.start()
    assert parts.manager.stop() is clean
    assert parts.notes[-3:] == ["stop c", "stop b", "stop a"]


def test_a_second_stop_does_nothing(parts: Parts) -> None:
    parts.add("a")
    parts.manager.start()
    parts.manager.stop()
    assert parts.manager.stop()
    assert parts.notes == ["start a", "stop a"]


def test_nothing_is_stopped_that_was_never_started(parts: Parts) -> None:
    parts.add("a")
    assert parts.manager.stop()
    assert parts.notes == []


def test_a_manager_is_a_context(parts: Parts) -> None:
    parts.add("a")
    with contextlib.suppress(KeyError), parts.manager as manager:
        assert manager is parts.manager
        assert parts.notes == ["start a"]
        raise KeyError
    assert parts.notes == ["start a", "stop a"]


# -- a whole provisioner, with an API server that is not there

NOWHERE = ClientConfig(server="http://127.0.0.1:1", tokens=NoToken())


class Idle(Provisioner[Settings, NoParameters]):
    """Provisions nothing; ``starting`` is called by ``start``."""

    starting: Callable[[], None] = staticmethod(lambda: None)
    notes: list[str] = []

    def provision(self, request: ProvisionRequest[NoParameters]) -> ProvisionedVolume:
        raise NotImplementedError

    def delete(self, volume: PersistentVolume) -> None:
        raise NotImplementedError

    def start(self) -> None:
        type(self).starting()
        self.notes.append("start")

    def stop(self) -> None:
        self.notes.append("stop")


class WithDataPath(Idle):
    def data_path(self) -> str | None:
        return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


@contextlib.contextmanager
def running(kind: type[Idle], *, port: int) -> Iterator[Manager]:
    settings = Settings(provisioner_name="example.com/test", http_endpoint=f"127.0.0.1:{port}")
    with Manager.for_provisioner(kind, settings, NOWHERE) as manager:
        yield manager


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened to the provisioner."""
    notes: list[str] = []
    monkeypatch.setattr(Idle, "notes", notes)
    return notes


def test_a_provisioner_is_started_and_stopped_once(idle: list[str]) -> None:
    with running(Idle, port=free_port()):
        assert idle == ["start"]
    assert idle == ["start", "stop"]


def test_no_thread_is_left_behind(idle: list[str]) -> None:
    before = {thread.name for thread in threading.enumerate()}
    with running(Idle, port=free_port()):
        names = {thread.name for thread in threading.enumerate()} - before
        assert {"health", "events", "informer-persistentvolumeclaims"} <= names
    left = {thread.name for thread in threading.enumerate()} - before
    assert left == set()


def test_an_api_server_that_is_not_there_is_no_reason_for_a_restart(idle: list[str]) -> None:
    port = free_port()
    with running(Idle, port=port):
        assert get(port, "/healthz") == (200, "ok\n")
        code, text = get(port, "/readyz")
    assert code == 503
    assert text.startswith("[-] sync: waiting for the first list of persistentvolumeclaims")


def test_readiness_follows_the_data_path_alone_where_there_is_one(idle: list[str]) -> None:
    port = free_port()
    with running(WithDataPath, port=port):
        assert get(port, "/readyz") == (200, "ok\n")
        assert "[-] sync: waiting" in get(port, "/healthz?verbose")[1]


def test_trouble_of_a_part_of_the_back_end_is_shown_and_no_reason_for_a_restart(
    idle: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, found = free_port(), list[str]()
    monkeypatch.setattr(Idle, "trouble", lambda _self: "; ".join(found) or None)
    with running(WithDataPath, port=port):
        assert "[+] backend-parts" in get(port, "/healthz?verbose")[1]
        found.append("the second array is away")
        code, text = get(port, "/healthz?verbose")
        assert code == 200
        assert "[-] backend-parts: the second array is away" in text
        assert get(port, "/readyz") == (200, "ok\n")


def test_the_metrics_are_served(idle: list[str]) -> None:
    port = free_port()
    with running(Idle, port=port):
        code, text = get(port, "/metrics")
    assert code == 200
    for name in (
        "controller_persistentvolumeclaim_provision_total",
        "external_storage_claims_queue_depth 0.0",
        "external_storage_unsaved_volumes 0.0",
        "external_storage_events_dropped_total 0.0",
    ):
        assert name in text


def test_a_provisioner_that_takes_long_to_start_is_not_restarted_meanwhile(
    idle: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The endpoint is up before ``Provisioner.start``, which may wait out a grace period."""
    port, answers = free_port(), list[Any]()
    monkeypatch.setattr(
        Idle, "starting", staticmethod(lambda: answers.append(get(port, "/healthz")))
    )
    with running(Idle, port=port):
        pass
    assert answers == [(200, "ok\n")]


def test_an_address_that_is_taken_is_told_before_anything_starts(idle: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(CannotStart, match=r"--http-endpoint .* in use"),
            running(Idle, port=taken.getsockname()[1]),
        ):
            pass
    assert idle == []
