"""The helper on the storage host: its commands, its time, and the configuration that it saves."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.backend_suite import ONE, Bench
from tests.fake_host import GROUP, IQN, MIB, OWNER, PORTAL, THIN, FakeHost

from external_storage import (
    ProvisioningFailed,
)
from iscsi_targetd_provisioner.host import common, saved, serve
from iscsi_targetd_provisioner.host.common import Refused
from iscsi_targetd_provisioner.host.source import helper_source

NAME = "pvc-1"
TARGET = f"{IQN}:{NAME}"
FOREIGN = "iqn.2026-01.com.example:of-an-admin"


@pytest.fixture
def bench(host: FakeHost) -> Bench:
    return Bench(host.backend(), GROUP, portals=(PORTAL,), passwords=host.rtslib.passwords)


# -- the saved configuration


def test_what_others_have_saved_stays(tmp_path: Path) -> None:
    before = {
        "fabric_modules": [],
        "storage_objects": [
            {"plugin": "fileio", "name": NAME},
            {"plugin": "block", "name": NAME, "wwn": "old"},
            {"plugin": "block", "name": "admins"},
        ],
        "targets": [{"wwn": FOREIGN}, {"wwn": TARGET}, {"wwn": "gone"}],
        "other": 1,
    }
    new = {"plugin": "block", "name": NAME, "wwn": "new"}
    after = saved.merged(before, {NAME: new}, {TARGET: {"wwn": TARGET, "new": 1}, "gone": None})
    assert after["storage_objects"] == [
        {"plugin": "fileio", "name": NAME},
        {"plugin": "block", "name": "admins"},
        new,
    ]
    assert after["targets"] == [{"wwn": FOREIGN}, {"wwn": TARGET, "new": 1}]
    assert (after["other"], after["fabric_modules"]) == (1, [])
    path = tmp_path / "etc" / "saveconfig.json"
    saved.write_saved(str(path), after)
    assert saved.read_saved(str(path)) == after
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_text().splitlines()) == 1


def test_a_damaged_configuration_is_not_overwritten(host: FakeHost, bench: Bench) -> None:
    path = Path(host.rtslib.save_file)
    path.write_text("{")
    bench.backend.create(bench.pool, NAME, 8 * MIB, deadline=bench.deadline)
    with pytest.raises(ProvisioningFailed, match="is damaged"):
        bench.backend.export(bench.pool, NAME, bench.access(ONE), deadline=bench.deadline)
    assert path.read_text() == "{"


def test_a_disk_that_is_full_leaves_the_old_configuration_and_no_half_one(
    host: FakeHost, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.make(NAME, ONE)
    before = Path(host.rtslib.save_file).read_text()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ProvisioningFailed, match=r"cannot be saved: .*No space left"):
            bench.make("pvc-2", ONE)
    assert Path(host.rtslib.save_file).read_text() == before
    assert not Path(host.rtslib.save_file + ".external-storage").exists()
    # Undone, and saved by the next.
    bench.remove("pvc-2")
    assert json.loads(before) == json.loads(Path(host.rtslib.save_file).read_text())


# -- commands, time, and who has gone


def script(directory: Path, text: str) -> list[str]:
    path = directory / "command"
    path.write_text(f"import os, sys, time\n{text}\n")
    return [sys.executable, str(path)]


def test_a_change_is_never_killed_and_no_other_is_begun_beside_it(tmp_path: Path) -> None:
    go_on, done = tmp_path / "go-on", tmp_path / "done"
    os.mkfifo(go_on)
    argv = script(tmp_path, f"open({str(go_on)!r}).read(); open({str(done)!r}, 'w').write('x')")
    with pytest.raises(Refused, match="has not ended") as caught:
        common.change(argv, 0.1)
    assert caught.value.kind == "unknown"
    with pytest.raises(Refused, match="of an earlier request has not ended") as caught:
        common.change(["true"], 10)
    assert caught.value.kind == "busy"
    go_on.write_text("")
    (_, process) = common._running[0]
    assert process.wait(60) == 0
    assert done.exists()
    common.change(["true"], 10)


def test_a_command_that_reads_is_ended_at_its_time(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    argv = script(tmp_path, f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    with pytest.raises(Refused, match="has not ended"):
        common.run(argv, 2.0)
    assert common._running == []


def test_the_words_of_a_command_that_fails_are_told(tmp_path: Path) -> None:
    argv = script(
        tmp_path, "sys.stderr.write('Failed to find logical volume \"a/b\"\\n'); sys.exit(5)"
    )
    with pytest.raises(Refused, match="Failed to find logical volume") as caught:
        common.run(argv, 60)
    assert caught.value.kind == "not_found"
    assert common.run(script(tmp_path, "print('out')"), 60) == "out\n"
    with pytest.raises(Refused, match="is not installed"):
        common.run(["no-such-command"], 60)


def request(op: str, *, waited: float = 0.0, limit_s: float = 60.0, **args: Any) -> Any:
    came = time.monotonic() - waited
    return {"id": 1, "op": op, "args": args, "limit_s": limit_s, "came": came}


def test_a_change_is_not_begun_with_too_little_time_left(host: FakeHost) -> None:
    server = host.server()
    args: dict[str, Any] = {"pool": GROUP, "name": NAME, "size": 8 * MIB, "owner": [OWNER]}
    args["overcommit"] = 1.0
    [answer] = server.batch([request("create", waited=50.0, **args)])
    assert answer["error"]["kind"] == "busy"
    assert host.lvm.volumes == {}
    # Who has little time for all of it is served all the same, and reading takes no time.
    [answer] = server.batch([request("create", limit_s=10.0, **args)])
    assert answer["result"] == 8 * MIB
    [answer] = server.batch([request("exports", waited=50.0)])
    assert answer["result"] == []
    [answer] = server.batch([request("exports", waited=61.0)])
    assert answer["error"]["kind"] == "busy"


def test_a_helper_that_is_installed_for_one_pool_touches_no_other(host: FakeHost) -> None:
    server = host.server(THIN)
    args: dict[str, Any] = {"name": NAME, "size": 8 * MIB, "owner": [OWNER], "overcommit": 1.0}
    [answer] = server.batch([request("create", pool=GROUP, **args)])
    assert answer["error"]["text"] == f"pool {GROUP} is not one of those allowed here: {THIN}"
    [answer] = server.batch([request("create", pool=THIN, **args)])
    assert answer["result"] == 8 * MIB


def test_who_has_no_time_left_costs_the_others_none_of_theirs(
    host: FakeHost, tmp_path: Path
) -> None:
    """While another holds the lock of the host for a moment."""
    with (tmp_path / "targetcli.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        free = threading.Timer(0.3, fcntl.flock, (lock, fcntl.LOCK_UN))
        free.start()
        late, other = host.server().batch([request("exports", waited=61.0), request("exports")])
        free.join()
    assert late["error"]["kind"] == "busy"
    assert other["result"] == []


def test_what_has_waited_when_its_sender_goes_is_not_begun(host: FakeHost) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(command: str) -> None:
        if command == "lvcreate":
            begun.set()
            assert go_on.wait(60)

    host.lvm.before = slow
    asked, end = os.pipe()
    with os.fdopen(asked, "rb") as source:
        args = (source, lambda _answer: None, host.server())
        helper = threading.Thread(target=serve.serve, args=args)
        helper.start()
        given = {"pool": GROUP, "size": 8 * MIB, "owner": [OWNER], "overcommit": 1.0}
        for name in (NAME, "pvc-2"):
            message = {"id": 1, "op": "create", "args": {**given, "name": name}}
            os.write(end, json.dumps(message).encode() + b"\n")
            assert begun.wait(60)
        os.close(end)
        inbox = [thread for thread in threading.enumerate() if thread.name == "inbox"]
        for thread in inbox:
            thread.join(60)
        go_on.set()
        helper.join(60)
    # What it was in is ended; nothing else is begun.
    assert set(host.lvm.volumes) == {NAME}


def test_the_hosts_lock_is_taken_and_an_open_shell_of_targetcli_is_told(
    host: FakeHost, tmp_path: Path
) -> None:
    with (tmp_path / "targetcli.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        [answer] = host.server().batch([request("exports", limit_s=0.2)])
    assert answer["error"]["kind"] == "busy"
    assert "is a targetcli shell open" in answer["error"]["text"]


RTSLIB = """
class RTSLibError(Exception):
    pass
class Fabric:
    targets = ()
def RTSRoot():
    print("a library that prints")
def FabricModule(name):
    return Fabric
"""


@pytest.fixture
def sent(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The helper as the host gets it, on a Python that has nothing of ours."""
    library = tmp_path / "rtslib_fb"
    library.mkdir()
    (library / "__init__.py").write_text(RTSLIB)
    (library / "root.py").write_text(f"default_save_file = {str(tmp_path / 'saved')!r}\n")
    (library / "tcm.py").write_text("bs_cache = {}\n")
    text = helper_source()
    for lock in (serve.OWN_LOCK, serve.TARGETCLI_LOCK):
        assert lock in text
        text = text.replace(lock, str(tmp_path / Path(lock).name))
    (program := tmp_path / "helper").write_text(text)
    # Python looks beside the program for what it imports.
    argv = [sys.executable, str(program)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, env={}, stdin=pipe, stdout=pipe, stderr=pipe)
    with process:
        yield process
        process.kill()


def test_the_helper_as_it_is_sent_answers_and_ends_with_who_reads_it(
    sent: subprocess.Popen[bytes],
) -> None:
    assert sent.stdin is not None
    assert sent.stdout is not None
    assert sent.stderr is not None
    assert json.loads(sent.stdout.readline())["hello"]["protocol"] == serve.PROTOCOL
    ask = b'{"id": 1, "op": "exports", "args": {}, "limit_s": 60}\n'
    sent.stdin.write(ask)
    sent.stdin.flush()
    assert json.loads(sent.stdout.readline()) == {"id": 1, "result": []}
    # Its reader goes while its requests are still open: it ends, and Python does not abort.
    sent.stdout.close()
    sent.stdin.write(ask)
    sent.stdin.flush()
    assert sent.wait(60) == 1
    assert b"BrokenPipeError" in sent.stderr.read()
