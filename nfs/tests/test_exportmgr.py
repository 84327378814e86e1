"""The D-Bus client against a real Ganesha; a fake gives the answers that it cannot be made to."""

from __future__ import annotations

import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from jeepney import (
    DBusAddress,
    HeaderFields,
    Message,
    new_error,
    new_method_call,
    new_method_return,
)

from nfs_provisioner.bus import BusConnection, Frames, is_method_call, socket_path
from nfs_provisioner.bus_relay import BusRelay
from nfs_provisioner.exportmgr import BusUnavailable, Busy, ExportManager, ExportRejected


def _export_file(server, name: str):
    server.directories.create(name, mode=0o755, gid=None)
    export = server.exports.describe(name, server.ids.allocate(name))
    return server.files.write(export), export


def test_add_show_remove(server) -> None:
    file, export = _export_file(server, "pvc-a")
    assert server.manager.show() == {}
    server.manager.add(file, export.export_id, path=export.path)
    assert server.manager.show() == {export.export_id: str(export.path)}
    assert server.manager.path_of(export.export_id) == str(export.path)
    server.manager.remove(export.export_id)
    assert server.manager.show() == {}
    assert server.manager.path_of(export.export_id) is None


def test_add_twice_is_success_only_for_the_same_path(server) -> None:
    file, export = _export_file(server, "pvc-a")
    server.manager.add(file, export.export_id, path=export.path)
    server.manager.add(file, export.export_id, path=export.path)
    with pytest.raises(ExportRejected, match="already active"):
        server.manager.add(file, export.export_id, path=server.root / "another")


def test_remove_of_an_unknown_id_is_success(server) -> None:
    server.manager.remove(4711)


def test_the_pseudo_root_is_neither_shown_nor_removed(server) -> None:
    assert 0 not in server.manager.show()
    with pytest.raises(ExportRejected, match="Cannot remove export with id 0"):
        server.manager.remove(0)


def test_missing_directory_and_missing_file_are_rejected(server) -> None:
    file, export = _export_file(server, "pvc-a")
    export.path.rmdir()
    with pytest.raises(ExportRejected, match="block validation"):
        server.manager.add(file, export.export_id, path=export.path)
    with pytest.raises(ExportRejected, match="export 9 of"):
        server.manager.add(file.with_name("none.conf"), 9, path=export.path)
    assert server.manager.show() == {}


def test_a_rejected_call_leaves_the_connection_usable(server) -> None:
    with pytest.raises(ExportRejected):
        server.manager.remove(0)
    server.manager.ping()
    assert server.manager.show() == {}


def test_many_threads_share_one_manager(server) -> None:
    described = [_export_file(server, f"pvc-{n}") for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(lambda d: server.manager.add(d[0], d[1].export_id, path=d[1].path), described)
        )
        shown = list(pool.map(lambda _: len(server.manager.show()), range(8)))
    assert shown == [40] * 8


def test_no_bus_and_no_ganesha_are_unavailable(stopped_server, root) -> None:
    with pytest.raises(BusUnavailable, match="No such file"):
        ExportManager(f"unix:path={root}/none").show()
    stopped_server.ganesha.start()
    os.kill(stopped_server.ganesha.pid, signal.SIGSTOP)
    quick = ExportManager(stopped_server.config.bus_address, timeout_s=0.2)
    with pytest.raises(BusUnavailable, match="no answer"):
        quick.show()
    os.kill(stopped_server.ganesha.pid, signal.SIGCONT)
    # The late answer to the first call is not taken for the answer to the second.
    patient = ExportManager(stopped_server.config.bus_address)
    assert patient.show() == {}
    assert quick.path_of(5) is None
    quick.close()
    patient.close()


def test_survives_bus_killed_between_calls(server, wait_until) -> None:
    assert server.manager.show() == {}
    os.kill(server.ganesha.bus_pid, signal.SIGKILL)
    wait_until(lambda: server.ganesha.bus_restarts == 1, what="the bus is started again")
    wait_until(lambda: server.ganesha.manageable() is None, what="ganesha is back on it")
    assert server.manager.show() == {}, "the dead connection is replaced within the call"


def test_address_must_be_a_unix_path() -> None:
    with pytest.raises(ValueError, match="not a unix:path= D-Bus address"):
        socket_path("tcp:host=127.0.0.1")


class FakeBus:
    """Says Hello and answers every other call with what the test wants."""

    def __init__(self, path, answer) -> None:
        self.calls = 0
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        sock, _ = self._listener.accept()
        received = b""
        while b"BEGIN\r\n" not in received:
            received += (data := sock.recv(4096))
            if data.endswith(b"AUTH EXTERNAL 30\r\n") or b"AUTH EXTERNAL" in data:
                sock.sendall(b"OK 1234deadbeef\r\n")
        frames = Frames(received.partition(b"BEGIN\r\n")[2])
        while True:
            for frame in frames:
                sock.sendall(self._reply(Message.from_buffer(frame)))
            if not (data := sock.recv(4096)):
                return
            frames.feed(data)

    def _reply(self, call: Message) -> bytes:
        if call.header.fields[HeaderFields.member] == "Hello":
            reply = new_method_return(call, "s", (":1.1",))
        else:
            self.calls += 1
            reply = self._answer(call, self.calls)
        data: bytes = reply.serialise(serial=self.calls + 1)
        return data


def _busy(call: Message) -> Message:
    name = "org.freedesktop.DBus.Error.InvalidArgs"
    text = "another export admin operation is in progress, try again later"
    return new_error(call, name, "s", (text,))


def test_busy_is_tried_again(root) -> None:
    bus = FakeBus(root / "bus", lambda call, n: _busy(call) if n < 3 else new_method_return(call))
    ExportManager(f"unix:path={root}/bus").remove(5)
    assert bus.calls == 3


def test_busy_for_too_long_is_said(root, monkeypatch) -> None:
    monkeypatch.setattr("nfs_provisioner.exportmgr._BUSY_PAUSE_S", 0.001)
    bus = FakeBus(root / "bus", lambda call, _: _busy(call))
    with pytest.raises(Busy, match="in progress"):
        ExportManager(f"unix:path={root}/bus").remove(5)
    assert bus.calls == 20


def test_nothing_added_is_a_rejection(root) -> None:
    def nothing(call: Message, _: int) -> Message:
        return new_method_return(call, "s", ("0 exports added. Errors found: no access",))

    FakeBus(root / "bus", nothing)
    with pytest.raises(ExportRejected, match="no access"):
        ExportManager(f"unix:path={root}/bus").add(root / "f", 5, path=root)


def test_frames_are_cut_wherever_the_stream_is(root) -> None:
    message = new_method_return(_call_message(), "s", ("x" * 1000,)).serialise(serial=7)
    stream = message * 3
    got: list[bytes] = []
    frames = Frames()
    for start in range(0, len(stream), 13):
        frames.feed(stream[start : start + 13])
        got += frames
    assert got == [message] * 3
    assert not is_method_call(message)
    frames.feed(b"l\2\0\1" + b"\xff" * 12)
    with pytest.raises(ConnectionError, match="bytes"):
        list(frames)


def _call_message() -> Message:
    call = new_method_call(DBusAddress("/x", bus_name="a.b", interface="a.b"), "M")
    call.header.serial = 3
    return call


def test_relay_lets_in_one_client_only(server) -> None:
    with pytest.raises(ConnectionError):
        BusConnection.open(server.config.relay_socket, timeout_s=5)
    server.manager.ping()


def test_relay_refuses_other_mechanisms_and_outlives_bad_clients(root) -> None:
    relay = BusRelay(relay_socket=root / "relay", bus_socket=root / "none")
    relay.start()
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(root / "relay"))
            client.sendall(b"\0AUTH ANONYMOUS\r\n")
            assert client.recv(100) == b"REJECTED EXTERNAL\r\n"
        connection = BusConnection.open(root / "relay", timeout_s=5)
        connection.close()
    finally:
        relay.stop()
    assert not (root / "relay").exists()
