"""List and watch: on the real API server, and against every odd end a watch can have."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from external_storage import StorageClass
from external_storage.informer import Change, Informer, Reflector, reflector
from external_storage.kube.auth import ClientConfig, NoToken
from external_storage.kube.client import Client
from external_storage.testing import ControlPlane
from external_storage.workqueue import Backoff

Until = Callable[..., Any]


def _object(name: str, version: int) -> dict[str, Any]:
    return {"metadata": {"name": name, "uid": f"uid-{name}", "resourceVersion": str(version)}}


def _line(kind: str, body: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": body}).encode() + b"\n"


class Api:
    """Lists and watches as scripted: each takes the next entry; a watch without one stays open."""

    def __init__(self) -> None:
        self.lists: list[tuple[str, list[dict[str, Any]]]] = []
        self.watches: list[tuple[int, bytes]] = []
        self.asked: list[str] = []
        self.closing = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                if "watch" not in query:
                    outer.asked.append("list")
                    version, items = outer.lists.pop(0)
                    body = {"metadata": {"resourceVersion": version}, "items": items}
                    return self._whole(200, json.dumps(body).encode())
                outer.asked.append(f"watch {query['resourceVersion'][0]}")
                if outer.watches:
                    return self._whole(*outer.watches.pop(0))
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.flush()
                outer.closing.wait(60)
                return None

            def _whole(self, code: int, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.client = Client(ClientConfig(server=url, tokens=NoToken()))

    def stop(self) -> None:
        self.closing.set()
        self.client.close()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Recorder:
    """A sink that writes down what it is given."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def replace(self, items: Iterable[StorageClass]) -> None:
        self.seen.append("replace " + ",".join(item.name for item in items))

    def apply(self, item: StorageClass, deleted: bool) -> None:
        self.seen.append(("deleted " if deleted else "changed ") + item.name)


@pytest.fixture
def scripted_api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    monkeypatch.setattr(reflector, "BACKOFF", Backoff(start_s=0.01, max_s=0.02))
    server = Api()
    yield server
    server.stop()


@pytest.fixture
def run(scripted_api: Api, until: Until) -> Iterator[Callable[[list[str]], Recorder]]:
    """Runs a reflector until the server has been asked what is expected, no more and no less."""
    running: list[tuple[Reflector[StorageClass], threading.Thread]] = []

    def start(asked: list[str]) -> Recorder:
        sink = Recorder()
        under_test = Reflector(scripted_api.client, StorageClass, sink)
        thread = threading.Thread(target=under_test.run)
        running.append((under_test, thread))
        thread.start()
        until(lambda: len(scripted_api.asked) >= len(asked), f"asked for {asked}")
        assert scripted_api.asked == asked
        return sink

    yield start
    for under_test, thread in running:
        under_test.stop()
        thread.join(30)
        assert not thread.is_alive(), "stop does not end a watch"


def test_a_watch_begins_where_the_list_ended(
    scripted_api: Api, run: Callable[[list[str]], Recorder], until: Until
) -> None:
    scripted_api.lists.append(("7", [_object("a", 5)]))
    sink = run(["list", "watch 7"])
    assert sink.seen == ["replace a"]


def test_a_clean_end_is_continued_from_the_last_version_without_a_list(
    scripted_api: Api, run: Callable[[list[str]], Recorder]
) -> None:
    scripted_api.lists.append(("7", []))
    lines = _line("ADDED", _object("a", 8)) + _line("DELETED", _object("a", 9))
    scripted_api.watches.append((200, lines))
    sink = run(["list", "watch 7", "watch 9"])
    assert sink.seen == ["replace ", "changed a", "deleted a"]


def test_a_bookmark_moves_the_version_and_tells_nobody(
    scripted_api: Api, run: Callable[[list[str]], Recorder]
) -> None:
    scripted_api.lists.append(("7", []))
    scripted_api.watches.append((200, _line("BOOKMARK", _object("", 900))))
    sink = run(["list", "watch 7", "watch 900"])
    assert sink.seen == ["replace "]


_GONE = {"kind": "Status", "status": "Failure", "reason": "Expired", "code": 410, "message": "old"}


@pytest.mark.parametrize(
    "answer",
    [(200, _line("ERROR", _GONE)), (410, json.dumps(_GONE).encode())],
    ids=["as an event", "as a status"],
)
def test_410_lists_again(
    scripted_api: Api, run: Callable[[list[str]], Recorder], answer: tuple[int, bytes]
) -> None:
    scripted_api.lists += [("7", [_object("a", 5)]), ("20", [_object("b", 18)])]
    scripted_api.watches.append(answer)
    sink = run(["list", "watch 7", "list", "watch 20"])
    assert sink.seen == ["replace a", "replace b"]


def test_another_error_continues_the_watch_after_a_pause(
    scripted_api: Api, run: Callable[[list[str]], Recorder]
) -> None:
    scripted_api.lists.append(("7", []))
    scripted_api.watches += [(200, _line("ADDED", _object("a", 8))), (500, b"oh")]
    sink = run(["list", "watch 7", "watch 8", "watch 8"])
    assert sink.seen == ["replace ", "changed a"]


def test_a_watch_that_ends_as_soon_as_it_began_is_not_asked_for_again_at_once(
    scripted_api: Api, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reflector, "BACKOFF", Backoff(start_s=3600, max_s=3600))
    scripted_api.lists.append(("7", []))
    scripted_api.watches.append((200, b""))
    under_test = Reflector(scripted_api.client, StorageClass, Recorder())
    thread = threading.Thread(target=under_test.run)
    thread.start()
    until(lambda: under_test.failures == 1, "the end counts as a failure")
    assert scripted_api.asked == ["list", "watch 7"]
    under_test.stop()
    thread.join(30)
    assert not thread.is_alive()


def test_a_line_that_makes_no_sense_lists_again(
    scripted_api: Api, run: Callable[[list[str]], Recorder]
) -> None:
    scripted_api.lists += [("7", []), ("9", [])]
    scripted_api.watches.append((200, b"{what\n"))
    run(["list", "watch 7", "list", "watch 9"])


def test_lines_may_have_any_length(scripted_api: Api, run: Callable[[list[str]], Recorder]) -> None:
    scripted_api.lists.append(("7", []))
    long = _object("a", 8)
    long["parameters"] = {"x": "y" * 5_000_000}
    scripted_api.watches.append((200, _line("ADDED", long)))
    sink = run(["list", "watch 7", "watch 8"])
    assert sink.seen == ["replace ", "changed a"]


def test_a_sink_that_raises_does_not_end_the_reflector(scripted_api: Api, until: Until) -> None:
    class Clumsy(Recorder):
        def apply(self, item: StorageClass, deleted: bool) -> None:
            super().apply(item, deleted)
            raise ValueError("a defect")

    scripted_api.lists += [("7", []), ("9", [_object("a", 8)])]
    scripted_api.watches.append((200, _line("ADDED", _object("a", 8))))
    sink = Clumsy()
    under_test = Reflector(scripted_api.client, StorageClass, sink)
    thread = threading.Thread(target=under_test.run)
    thread.start()
    until(lambda: sink.seen[-1:] == ["replace a"], "listed again")
    under_test.stop()
    thread.join(30)
    assert not thread.is_alive()


def test_stop_wakes_a_back_off(scripted_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector, "BACKOFF", Backoff(start_s=3600, max_s=3600))
    client = Client(ClientConfig(server="http://127.0.0.1:1", tokens=NoToken()))
    under_test = Reflector(client, StorageClass, Recorder())
    thread = threading.Thread(target=under_test.run)
    thread.start()
    under_test.stop()
    thread.join(30)
    assert not thread.is_alive()


def _follow(client: Client, prefix: str) -> tuple[Informer[StorageClass], list[str]]:
    told: list[str] = []

    def note(change: Change[StorageClass]) -> None:
        if change.old is None:
            told.append(f"+{change.new.name}" if change.new else "?")
        else:
            told.append(f"~{change.old.name}" if change.new else f"-{change.old.name}")

    informer = Informer(client, StorageClass, keep=lambda item: item.name.startswith(prefix))
    informer.add_handler(note)
    informer.start()
    assert informer.wait_synced(60)
    return informer, told


def _create(api: Client, name: str) -> StorageClass:
    return api.create(StorageClass, {"metadata": {"name": name}, "provisioner": "example.com/x"})


def test_an_informer_follows_a_real_api_server(api: Client, namespace: str, until: Until) -> None:
    first = _create(api, f"{namespace}-1")
    informer, told = _follow(api, namespace)
    try:
        assert [item.name for item in informer.lister.all()] == [first.name]
        second = _create(api, f"{namespace}-2")
        api.patch(StorageClass, second.name, {"metadata": {"labels": {"a": "b"}}})
        api.delete(StorageClass, first.name, uid=first.uid)
        expected = [f"+{first.name}", f"+{second.name}", f"~{second.name}", f"-{first.name}"]
        until(lambda: told == expected, f"told {expected}")
        api.delete(StorageClass, second.name, uid=second.uid)
        until(lambda: len(informer.lister) == 0, "the store is empty")
    finally:
        informer.stop()


def test_survives_an_api_server_restart(
    control_plane: ControlPlane, api: Client, namespace: str, until: Until
) -> None:
    first = _create(api, f"{namespace}-1")
    informer, told = _follow(api, namespace)
    try:
        control_plane.stop_apiserver()
        until(lambda: not informer.reflector.connected, "the outage is seen")
        control_plane.start_apiserver()
        second = _create(api, f"{namespace}-2")
        expected = [f"+{first.name}", f"+{second.name}"]
        until(lambda: told == expected, f"told {expected}")
        assert informer.reflector.failures < 10, "it must back off"
    finally:
        informer.stop()
        for made in (first.name, f"{namespace}-2"):
            control_plane.kubectl("delete", "storageclass", made, "--wait=false")
