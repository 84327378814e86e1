"""The transport to targetd: what it sends, what it takes, and what it makes of everything else."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.targetd_server import MAX_BODY, PASSWORD, USER, TargetdError, TargetdServer, unused_port

from external_storage import Deadline, ProvisioningInBackground, Unchanged
from iscsi_targetd_provisioner.rpc import REFUSED_PAUSE_S, Account, Rpc, RpcError, connect


def soon(seconds: float = 60.0) -> Deadline:
    return Deadline(time.monotonic() + seconds)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def rpc_to(port: int, *, password: str = PASSWORD, clock: Clock | None = None) -> Rpc:
    clock = clock or Clock()
    return Rpc(
        host="storage",
        account=Account(user=lambda: USER, password=lambda: password),
        open_stream=connect("127.0.0.1", port, context=None),
        clock=clock,
        sleep=clock.sleep,
    )


def answering(content: bytes) -> tuple[int, threading.Thread]:
    """A server that answers one connection with these bytes, whatever it is asked."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(1 << 16)
            connection.sendall(content)

    thread = threading.Thread(target=serve)
    thread.start()
    return listener.getsockname()[1], thread


def test_a_result_is_returned(targetd: TargetdServer) -> None:
    pools = rpc_to(targetd.port).call("pool_list", soon(), changes=False)
    assert [pool["name"] for pool in pools] == ["vg-targetd", "fast/thin", "/mnt/btrfs"]


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("vol_list", {"pool": "nowhere"}, -110),
        ("vol_destroy", {"pool": "vg-targetd", "name": "none"}, -103),
        ("no_such_method", {}, -32601),
        ("vol_list", {"no": "such argument"}, -32602),
        (
            "export_destroy",
            {"pool": "vg-targetd", "vol": "v", "initiator_wwn": "iqn.2026-01.a.b:c"},
            -151,
        ),
    ],
)
def test_each_error_keeps_its_code(
    targetd: TargetdServer, method: str, params: dict[str, Any], code: int
) -> None:
    with pytest.raises(RpcError) as caught:
        rpc_to(targetd.port).call(method, soon(), changes=True, **params)
    assert caught.value.code == code


def test_a_refused_password_is_not_tried_again_for_a_while(targetd: TargetdServer) -> None:
    clock = Clock()
    rpc = rpc_to(targetd.port, password="a wrong one", clock=clock)
    with pytest.raises(Unchanged, match="refuses our user name or password"):
        rpc.call("pool_list", soon(), changes=False)
    for _ in range(3):
        with pytest.raises(Unchanged, match="has refused our user name"):
            rpc.call("pool_list", soon(), changes=False)
    assert targetd.refused == 1
    clock.now += REFUSED_PAUSE_S
    with pytest.raises(Unchanged, match="refuses"):
        rpc.call("pool_list", soon(), changes=False)
    assert targetd.refused == 2


def test_while_another_is_held_back_for_a_wrong_password_ours_waits(targetd: TargetdServer) -> None:
    refused = threading.Event()
    targetd._tarpit.add("127.0.0.1")
    clock = Clock()

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        targetd._tarpit.discard("127.0.0.1")
        refused.set()

    rpc = rpc_to(targetd.port, clock=clock)
    rpc.sleep = sleep
    assert rpc.call("pool_list", soon(), changes=False)
    assert (targetd.turned_away, clock.slept, refused.is_set()) == (1, [2.0], True)


def test_a_password_that_is_always_held_back_is_told(targetd: TargetdServer) -> None:
    targetd._tarpit.add("127.0.0.1")
    with pytest.raises(Unchanged, match=r"refusing a password from our address \(503\)"):
        rpc_to(targetd.port).call("pool_list", soon(), changes=True)
    assert targetd.turned_away == 5


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "hung up without an answer"),
        (b'{"error": {"code": -32700, "mess', "no status line"),
        (b"HTTP/1.0 200 OK\r\nContent-type: application/json\r\n\r\n{", "cut off or no JSON-RPC"),
        (b"HTTP/1.0 200 OK\r\n\r\n[1]", "cut off or no JSON-RPC"),
        (b'HTTP/1.0 200 OK\r\n\r\n{"result": null, "id": 7}', "is another request's"),
    ],
)
def test_half_an_answer_is_no_answer(content: bytes, words: str, changes: bool) -> None:
    port, thread = answering(content)
    expected = ProvisioningInBackground if changes else Unchanged
    with pytest.raises(expected, match=words):
        rpc_to(port).call("vol_create", soon(), changes=changes)
    thread.join()


def test_what_targetd_could_not_read_was_not_done() -> None:
    """Its answer to that has no status line; a client of ours that sends it is no state of the
    host."""
    port, thread = answering(b'{"error": {"code": -32700, "message": "parse error"}, "id": 0}')
    with pytest.raises(Unchanged, match="did not understand our request"):
        rpc_to(port).call("vol_create", soon(), changes=True)
    thread.join()


def test_an_error_that_repeats_our_secrets_does_not_show_them(targetd: TargetdServer) -> None:
    def fault(_method: str, _do: Callable[[], Any]) -> Any:
        raise TargetdError(-1, "RTSLibError: a secret of alice, a secret of bob: too long")

    params = {"initiator_wwn": "iqn.2026-01.a.b:c", "in_user": "alice", "out_user": "bob"}
    secrets = {"in_pass": "a secret of alice", "out_pass": "a secret of bob"}
    with (
        targetd.faulty(fault),
        pytest.raises(RpcError, match=r"\*\*\*, \*\*\*: too long") as caught,
    ):
        rpc_to(targetd.port).call("initiator_set_auth", soon(), changes=True, **params, **secrets)
    assert "a secret" not in str(caught.value)


@pytest.mark.parametrize("status", [b"404 Not Found", b"501 Unsupported", b"413 Too large"])
def test_what_is_no_targetd_is_told(status: bytes) -> None:
    port, thread = answering(b"HTTP/1.0 " + status + b"\r\n\r\n<html>")
    with pytest.raises(Unchanged, match="is this a targetd"):
        rpc_to(port).call("vol_create", soon(), changes=True)
    thread.join()


def test_an_answer_that_never_comes_is_not_waited_for_beyond_the_deadline(
    targetd: TargetdServer,
) -> None:
    targetd.fail_once(1, "lost")
    params = {"pool": "vg-targetd", "name": "pvc-1", "size": 1}
    with pytest.raises(ProvisioningInBackground, match="no answer in time"):
        rpc_to(targetd.port).call("vol_create", soon(1.0), changes=True, **params)


def test_a_daemon_that_is_down_is_told() -> None:
    with pytest.raises(Unchanged, match="cannot be reached: Connection refused"):
        rpc_to(unused_port()).call("vol_create", soon(), changes=True)


# -- the server of the tests is to targetd's letter, or they prove nothing


CALL = b'{"jsonrpc": "2.0", "method": "pool_list", "id": %b}'


@pytest.mark.parametrize(("number", "code"), [(b"null", -1), (b'"x"', -32600), (b"[]", -1)])
def test_a_request_without_a_good_number_is_answered_as_by_targetd(
    targetd: TargetdServer, number: bytes, code: int
) -> None:
    _, _, body = raw(targetd.port, posted(CALL % number)).partition(b"\r\n\r\n")
    answer = json.loads(body)
    assert (answer["error"]["code"], answer["id"]) == (code, 0)


def raw(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request)
        parts = b""
        while data := connection.recv(1 << 16):
            parts += data
        return parts


def posted(body: bytes, *, headers: str = "", path: str = "/targetrpc") -> bytes:
    account = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    head = f"POST {path} HTTP/1.0\r\nAuthorization: Basic {account}\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


CASES: list[tuple[str, Callable[[], bytes], bytes]] = [
    ("parse error", lambda: posted(b"{"), b'{"error": {"code": -32700'),
    ("path", lambda: posted(b"{}", path="/x"), b"HTTP/1.0 404"),
    ("batch", lambda: posted(b"[]"), b"HTTP/1.0 200"),
    ("no number", lambda: posted(CALL % b'"x"'), b"HTTP/1.0 200"),
    ("large", lambda: posted(b"x" * (MAX_BODY + 1)), b"HTTP/1.0 413"),
    ("nobody", lambda: b"POST /targetrpc HTTP/1.0\r\n\r\n", b"HTTP/1.0 400"),
    ("get", lambda: b"GET /targetrpc HTTP/1.0\r\n\r\n", b"HTTP/1.0 501"),
]


@pytest.mark.parametrize(("request_of", "begin"), [case[1:] for case in CASES])
def test_the_server_of_these_tests_answers_as_targetd_does(
    targetd: TargetdServer, request_of: Callable[[], bytes], begin: bytes
) -> None:
    assert raw(targetd.port, request_of()).startswith(begin)


def test_the_server_of_these_tests_closes_without_a_length(targetd: TargetdServer) -> None:
    message = {"jsonrpc": "2.0", "method": "pool_list", "id": "12", "params": None}
    head, _, body = raw(targetd.port, posted(json.dumps(message).encode())).partition(b"\r\n\r\n")
    assert b"content-length" not in head.lower()
    assert json.loads(body)["id"] == 12
