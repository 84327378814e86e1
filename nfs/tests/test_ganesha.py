"""The server and its bus: started, stopped, killed in every order."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nfs_provisioner.ganesha import Ganesha, GaneshaError
from nfs_provisioner.ganesha_config import GaneshaConfig
from nfs_provisioner.supervisor import _STILL_OUR_CHILD


def test_start_and_stop_leave_nothing_behind(stopped_server) -> None:
    server = stopped_server
    server.ganesha.start()
    assert server.ganesha.serving() is None
    assert server.ganesha.manageable() is None
    assert sorted(server.processes()) == sorted([server.ganesha.pid, server.ganesha.bus_pid])
    server.ganesha.stop()
    assert server.processes() == []
    assert server.ganesha.serving() is not None
    assert server.ganesha.manageable() is not None
    assert not server.config.relay_socket.exists()


def test_stop_is_idempotent_and_fine_before_start(stopped_server) -> None:
    stopped_server.ganesha.stop()
    stopped_server.ganesha.start()
    stopped_server.ganesha.stop()
    stopped_server.ganesha.stop()
    assert stopped_server.processes() == []


def test_a_second_start_has_the_exports_of_the_first(stopped_server) -> None:
    server = stopped_server
    server.ganesha.start()
    export = server.volume("pvc-a")
    server.ganesha.stop()
    again = Ganesha(server.config)
    try:
        again.start()
        assert server.manager.show() == {export.export_id: str(export.path)}
    finally:
        again.stop()


def test_survives_ganesha_killed(server, wait_until) -> None:
    first, second = server.volume("pvc-a"), server.volume("pvc-b")
    server.put("/export/pvc-a/kept.txt", "written before")
    before, pid = server.manager.show(), server.ganesha.pid

    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.restarted, what="on_restart called")

    assert server.ganesha.pid != pid
    assert server.ganesha.ganesha_restarts == 1
    assert server.ganesha.bus_restarts == 0
    assert server.ganesha.serving() is None
    assert server.manager.show() == before == {e.export_id: str(e.path) for e in (first, second)}
    assert server.get("/export/pvc-a/kept.txt") == "written before"
    server.volume("pvc-c")
    server.put("/export/pvc-c/new.txt", "written after")


def test_survives_bus_killed_without_touching_the_data_path(
    server, open_nfs_file, wait_until
) -> None:
    """A connected client writes and reads back the whole time, three deaths of the bus long."""
    server.volume("pvc-a")
    pid = server.ganesha.pid
    file = open_nfs_file(server.url("/export/pvc-a/log"))
    done, written, errors, slowest = threading.Event(), [0], [], [0.0]

    def write_all_the_time() -> None:
        try:
            while not done.is_set():
                started = time.monotonic()
                line = f"{written[0]:015d}\n".encode()
                file.write(written[0] * 16, line)
                assert file.read(written[0] * 16, 16) == line
                written[0] += 1
                slowest[0] = max(slowest[0], time.monotonic() - started)
        except Exception as error:
            errors.append(error)

    writer = threading.Thread(target=write_all_the_time)
    writer.start()
    try:
        for count in range(1, 4):
            at = written[0]
            wait_until(lambda at=at: written[0] > at + 20 or errors, what="the client writes")
            os.kill(server.ganesha.bus_pid, signal.SIGKILL)
            wait_until(
                lambda n=count: (
                    server.ganesha.bus_restarts == n and server.ganesha.manageable() is None
                ),
                what="provisioning resumes",
            )
            at = written[0]
            server.volume(f"pvc-new-{count}")
            wait_until(lambda at=at: written[0] > at + 20 or errors, what="the client writes on")
    finally:
        done.set()
        writer.join()

    assert errors == []
    assert server.ganesha.pid == pid, "ganesha must not end with the bus"
    assert server.ganesha.ganesha_restarts == 0
    assert server.restarted == []
    assert (server.root / "pvc-a/log").read_bytes() == b"".join(
        f"{number:015d}\n".encode() for number in range(written[0])
    )
    assert len(server.manager.show()) == 4
    print(f"{written[0]} writes, slowest {slowest[0] * 1000:.0f} ms")


def test_port_is_served_while_the_bus_is_away(server, wait_until) -> None:
    server.volume("pvc-a")
    # Stopped and not killed: present, but it answers nobody, for as long as we like.
    bus = server.ganesha.bus_pid
    os.kill(bus, signal.SIGSTOP)
    try:
        assert server.ganesha.manageable() is not None
        assert server.ganesha.serving() is None
        server.put("/export/pvc-a/x", "served")
    finally:
        os.kill(bus, signal.SIGCONT)
    wait_until(lambda: server.ganesha.manageable() is None, what="provisioning resumes")


def test_survives_bus_and_ganesha_killed_together(server, wait_until) -> None:
    export = server.volume("pvc-a")
    os.kill(server.ganesha.bus_pid, signal.SIGKILL)
    os.kill(server.ganesha.pid, signal.SIGKILL)
    wait_until(lambda: server.restarted, what="on_restart called")
    assert server.manager.show() == {export.export_id: str(export.path)}


def test_a_server_that_hangs_does_not_count_as_serving(server, wait_until) -> None:
    os.kill(server.ganesha.pid, signal.SIGSTOP)
    # The kernel still takes connections on its behalf: only an answer says that it serves.
    assert "no answer on NFS port" in server.ganesha.serving()
    assert "no answer" in server.ganesha.manageable()
    os.kill(server.ganesha.pid, signal.SIGCONT)
    wait_until(lambda: server.ganesha.serving() is None, what="it answers again")


def test_a_server_that_hangs_for_long_is_killed_and_comes_back(
    server, wait_until, monkeypatch
) -> None:
    monkeypatch.setattr("nfs_provisioner.ganesha._LIFE_INTERVAL_S", 0.1)
    monkeypatch.setattr("nfs_provisioner.ganesha._LIFE_LIMIT_S", 1.0)
    hung = server.ganesha.pid
    os.kill(hung, signal.SIGSTOP)
    wait_until(lambda: server.ganesha.pid not in (None, hung), what="another server")
    wait_until(lambda: server.ganesha.serving() is None, what="it serves")
    assert server.ganesha.ganesha_restarts == 1


def test_children_die_with_a_killed_supervisor(stopped_server, wait_until) -> None:
    config = stopped_server.config
    script = textwrap.dedent(f"""\
        import time
        from pathlib import Path
        from nfs_provisioner.ganesha import Ganesha
        from nfs_provisioner.ganesha_config import GaneshaConfig
        ganesha = Ganesha(GaneshaConfig(
            state_dir=Path({str(config.state_dir)!r}), run_dir=Path({str(config.run_dir)!r}),
            port={config.port}, bind_address="127.0.0.1", grace_period_s=2, lease_lifetime_s=2))
        ganesha.start()
        print("up", flush=True)
        time.sleep(600)
        """)
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        children = [pid for pid in stopped_server.processes() if pid != parent.pid]
        assert len(children) == 2
    finally:
        parent.kill()
        parent.communicate()
    wait_until(lambda: stopped_server.processes() == [], what="the children are gone")
    # And the successor starts on the same port and directories at once.
    stopped_server.ganesha.start()
    assert stopped_server.ganesha.serving() is None


def test_child_of_a_parent_that_died_too_early_does_not_run() -> None:
    """Between fork and prctl nobody kills it; so it looks who its parent is."""
    for parent, output in ((os.getpid(), b"ran\n"), (os.getppid(), b"")):
        command = ["sh", "-c", _STILL_OUR_CHILD, str(parent), "echo", "ran"]
        assert subprocess.run(command, capture_output=True).stdout == output


def test_port_in_use_is_said_clearly(stopped_server) -> None:
    config = stopped_server.config
    with (
        socket.create_server(("127.0.0.1", config.port)),
        pytest.raises(GaneshaError, match=rf"127\.0\.0\.1 port {config.port}.*in use"),
    ):
        stopped_server.ganesha.start()
    assert stopped_server.processes() == []


def test_ganeshas_log_is_ours_and_no_file(server, caplog, wait_until) -> None:
    caplog.set_level("INFO", logger="nfs_provisioner.ganesha")
    server.volume("pvc-a")
    os.kill(server.ganesha.pid, signal.SIGTERM)  # a line at each start, and so at the next one
    said = "NFS Server Now NOT IN GRACE"
    wait_until(
        lambda: any(getattr(r, "fields", {}).get("text") == said for r in caplog.records),
        what="a line of ganesha in our log",
    )
    lines = [record for record in caplog.records if record.getMessage() == "ganesha"]
    assert {"STATE"} <= {record.fields["component"] for record in lines}
    assert not [path for path in server.root.rglob("*") if path.suffix == ".log"]


def test_a_server_that_ends_while_starting_is_an_error_with_its_last_words(stopped_server) -> None:
    broken = stopped_server.config.exports_dir
    broken.mkdir(parents=True, exist_ok=True)
    (broken / "half.conf").write_text('EXPORT { Export_Id = 1; Path = "/x')
    ganesha = Ganesha(stopped_server.config, start_timeout_s=30)
    with pytest.raises(GaneshaError, match=r"(?s)exit code.*half.conf"):
        ganesha.start()
    assert stopped_server.processes() == []


def test_damaged_file_does_not_keep_ganesha_from_starting(stopped_server) -> None:
    server = stopped_server
    (server.config.exports_dir / "half.conf").write_text('EXPORT { Export_Id = 1; Path = "/x')
    server.ganesha.start()  # its before_start is ExportFiles.load
    assert server.manager.show() == {}
    assert (server.config.state_dir / "exports.bad/half.conf").exists()


def test_unhealthy_hooks_do_not_stop_the_supervisor(stopped_server, wait_until) -> None:
    def fails() -> None:
        raise RuntimeError("boom")

    ganesha = Ganesha(stopped_server.config, before_start=fails, on_restart=fails)
    try:
        ganesha.start()
        assert ganesha.pid is not None
        os.kill(ganesha.pid, signal.SIGKILL)
        wait_until(lambda: ganesha.ganesha_restarts == 1, what="started again")
        wait_until(lambda: ganesha.manageable() is None, what="ready again")
    finally:
        ganesha.stop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grace_period_s": 181}, "grace_period_s must be 0 to 180"),
        ({"lease_lifetime_s": 0}, "lease_lifetime_s must be 1 to 120"),
        ({"port": 0}, "port must be 1 to 65535"),
        ({"bind_address": "nfs.example.com"}, "must be an IP address"),
        ({"log_level": "LOUD"}, "log_level must be one of"),
        ({"state_dir": Path('/srv/a"b')}, "state_dir must be an absolute path"),
        ({"run_dir": Path("run")}, "run_dir must be an absolute path"),
        ({"run_dir": Path("/run/" + "x" * 100)}, "run_dir is too long by 8 bytes"),
    ],
)
def test_bad_configuration_is_named(change, message) -> None:
    good: dict[str, Any] = {
        "state_dir": Path("/srv/.state"),
        "run_dir": Path("/run/nfs-provisioner"),
    }
    GaneshaConfig(**good).validate()
    with pytest.raises(ValueError, match=message):
        GaneshaConfig(**{**good, **change}).validate()


def test_a_machine_without_mtab_is_told_what_to_do(
    stopped_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nfs_provisioner.ganesha._MTAB", stopped_server.root / "no-mtab")
    with pytest.raises(GaneshaError, match="ln -s /proc/self/mounts"):
        stopped_server.ganesha.start()
    assert stopped_server.processes() == []
