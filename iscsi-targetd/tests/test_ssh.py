"""The way to a storage host: a real sshd on loopback, and everything that can go wrong with it."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import paramiko
import pytest
from paramiko.common import AUTH_SUCCESSFUL, OPEN_SUCCEEDED
from tests.sshd import FAKE, Sshd, failure, soon, user
from tests.targetd_server import unused_port

from external_storage import (
    Deadline,
    Infeasible,
    ProvisionerError,
    ProvisioningInBackground,
    Unchanged,
    VolumeInUse,
)
from external_storage.testing.builders import Clock
from external_storage.testing.guest.storage import make_key
from iscsi_targetd_provisioner.helper_session import Helper, HelperRefused
from iscsi_targetd_provisioner.ssh import Connection, Login

# -- who is at the other end, and who are we


def test_a_host_that_is_not_known_is_refused(sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "known_hosts").write_text("")
    text = failure(sshd.helper(known_hosts=tmp_path / "known_hosts"))
    assert "not found in known_hosts" in text
    assert (tmp_path / "known_hosts").read_text() == ""


def test_a_host_whose_key_has_changed_is_refused(sshd: Sshd, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other")
    (tmp_path / "known_hosts").write_text(f"[127.0.0.1]:{sshd.port} {other}\n")
    text = failure(sshd.helper(known_hosts=tmp_path / "known_hosts"))
    assert "the host's key is not the one in" in text


def test_the_users_own_known_hosts_do_not_count(
    sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ssh").mkdir()
    shutil.copy(sshd.directory / "known_hosts", tmp_path / ".ssh" / "known_hosts")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty").write_text("")
    assert "not found" in failure(sshd.helper(known_hosts=tmp_path / "empty"))


def test_a_key_that_the_host_does_not_know_is_told(sshd: Sshd, tmp_path: Path) -> None:
    make_key(tmp_path / "key")
    text = failure(sshd.helper(key_file=tmp_path / "key"))
    assert f"does not accept our key or password for user {user()}" in text


def test_a_key_with_a_passphrase_needs_it(sshd: Sshd, tmp_path: Path) -> None:
    make_key(tmp_path / "key", passphrase="a long passphrase")
    assert "passphrase" in failure(sshd.helper(key_file=tmp_path / "key"))
    (tmp_path / "passphrase").write_text("a wrong passphrase\n")
    wrong = {"key_file": tmp_path / "key", "key_passphrase_file": tmp_path / "passphrase"}
    assert "a wrong passphrase" not in failure(sshd.helper("", **wrong))
    (tmp_path / "passphrase").write_text("a long passphrase\n")
    # It can be read now, and is refused by the host.
    assert "does not accept our key" in failure(sshd.helper("", **wrong))


@pytest.mark.parametrize("field", ["key_file", "known_hosts", "password_file"])
def test_a_file_that_is_not_there_is_named(sshd: Sshd, field: str) -> None:
    text = failure(sshd.helper("", **{field: Path("/nowhere/file")}))
    assert "No such file" in text
    assert "/nowhere/file" in text


def test_a_damaged_line_of_known_hosts_is_told(sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "known_hosts").write_text(f"[127.0.0.1]:{sshd.port} ssh-ed25519 AAAAC\n")
    text = failure(sshd.helper(known_hosts=tmp_path / "known_hosts"))
    assert "known_hosts: a line is damaged" in text


def test_a_host_that_is_down_is_told() -> None:
    login = Login(host="127.0.0.1", port=unused_port(), known_hosts=Path("/dev/null"))
    helper = Helper(open_channel=Connection(login).channel, host="storage", installed=True)
    assert "127.0.0.1" in failure(helper)


def test_a_host_that_says_nothing_is_not_waited_for_beyond_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        login = Login(host="127.0.0.1", port=port, known_hosts=Path("/dev/null"))
        helper = Helper(open_channel=Connection(login).channel, host="storage", installed=True)
        # Without an end of ours there is none: the host never speaks, and never hangs up.
        failure(helper, soon(0.3))


class Deaf(paramiko.ServerInterface):
    """A host that opens a session, and then never says whether the command has been started."""

    def __init__(self, ended: threading.Event) -> None:
        self.ended = ended

    def check_auth_password(self, _user: str, _password: str) -> int:
        return AUTH_SUCCESSFUL

    def check_channel_request(self, _kind: str, _number: int) -> int:
        return OPEN_SUCCEEDED

    def check_channel_exec_request(self, _channel: Any, _command: bytes) -> bool:
        self.ended.wait()
        return False


def test_a_host_that_does_not_start_the_command_stops_nobody_for_ever(tmp_path: Path) -> None:
    key = paramiko.ECDSAKey.generate()
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            transport = paramiko.Transport(listener.accept()[0])
            transport.add_server_key(key)
            transport.start_server(server=Deaf(ended))

        threading.Thread(target=serve, daemon=True).start()
        line = f"[127.0.0.1]:{port} {key.get_name()} {key.get_base64()}\n"
        (tmp_path / "known_hosts").write_text(line)
        (tmp_path / "password").write_text("x")
        login = Login(
            host="127.0.0.1",
            port=port,
            known_hosts=tmp_path / "known_hosts",
            password_file=tmp_path / "password",
        )
        helper = Helper(open_channel=Connection(login).channel, host="storage", installed=True)
        # The host waits for us to be told: without a watchdog this has no end.
        text = failure(helper, soon(3.0))
        ended.set()
    assert "no session" in text


# -- the helper begins


@pytest.mark.parametrize(
    ("start", "why"),
    [
        ("fatal", "LIO cannot be used by uid 1000"),
        ("refused", "sudo: a password is required"),
        ("old", "speaks protocol 1, not 2: run install-helper again"),
    ],
)
def test_a_helper_that_does_not_begin_says_why(sshd: Sshd, start: str, why: str) -> None:
    assert why in failure(sshd.helper(start=start))


def test_a_helper_that_says_nothing_is_not_waited_for_beyond_the_deadline(sshd: Sshd) -> None:
    helper = sshd.helper(start="silent")
    assert "does not start" in failure(helper, soon(2.0))


def test_what_a_shell_says_before_the_helper_is_passed_over(sshd: Sshd) -> None:
    with contextlib.closing(sshd.helper(start="noise")) as helper:
        assert helper.request("pools", {"a": 1}, soon()) == {"a": 1}


# -- and goes on


@pytest.fixture(scope="module")
def shared_helper(sshd: Sshd) -> Iterator[Helper]:
    with contextlib.closing(sshd.helper()) as made:
        yield made


@pytest.fixture
def helper(sshd: Sshd, shared_helper: Helper) -> Helper:
    """One that is connected: nothing below is about the time that takes."""
    sshd.set_command(f"{sys.executable} {FAKE}")
    assert shared_helper.request("pools", {}, soon()) == {}
    return shared_helper


@pytest.mark.parametrize("op", ["create", "destroy", "set_auth"])
def test_a_change_without_an_answer_is_not_known_to_have_failed(helper: Helper, op: str) -> None:
    with pytest.raises(ProvisioningInBackground, match="no answer in time"):
        helper.request(op, {"do": "hang"}, soon(0.2))


@pytest.mark.parametrize("op", ["pools", "volumes"])
def test_a_question_without_an_answer_changes_nothing(helper: Helper, op: str) -> None:
    with pytest.raises(Unchanged, match="no answer in time"):
        helper.request(op, {"do": "hang"}, soon(0.2))


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("half", "the helper has ended"),
        ("die", "the helper has ended: lvm has exploded"),
        ("nonsense", "an answer is not JSON"),
    ],
)
def test_a_connection_that_ends_amid_a_change_is_told_and_made_again(
    helper: Helper, what: str, why: str
) -> None:
    with pytest.raises(ProvisioningInBackground, match=why):
        helper.request("create", {"do": what}, soon())
    assert helper.request("create", {"again": 1}, soon()) == {"again": 1}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("no_space", Infeasible),
        ("in_use", VolumeInUse),
        ("busy", Unchanged),
        ("unknown", ProvisioningInBackground),
        ("foreign", HelperRefused),
        ("failed", HelperRefused),
    ],
)
def test_each_refusal_has_its_meaning(
    helper: Helper, kind: str, expected: type[ProvisionerError]
) -> None:
    with pytest.raises(expected, match="storage: no"):
        helper.request("create", {"do": "refuse", "kind": kind}, soon())


def test_a_late_answer_costs_the_others_nothing(helper: Helper) -> None:
    session = helper._session
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(helper.request, "create", {"do": "hold", "n": 1}, soon())
        with pytest.raises(ProvisioningInBackground, match="no answer in time"):
            helper.request("create", {"do": "hold", "n": 2}, soon(0.2))
        # The answer that nobody waits for any more comes now, with the other.
        while not held.done():
            helper.request("create", {"do": "release"}, soon())
        assert held.result()["n"] == 1
    assert helper._session is session


def test_a_helper_that_says_nothing_for_long_is_started_again(sshd: Sshd) -> None:
    clock = Clock()
    helper = sshd.helper()
    helper.clock = clock
    with contextlib.closing(helper):
        assert helper.request("pools", {}, soon()) == {}
        session = helper._session
        for _ in range(2):
            with pytest.raises(Unchanged, match="no answer in time"):
                helper.request("pools", {"do": "hang"}, soon(0.2))
            assert helper._session is session
            clock.advance(20)
        with pytest.raises(Unchanged, match="no answer in time"):
            helper.request("pools", {"do": "hang"}, soon(0.2))
        assert helper.request("pools", {}, soon()) == {}
        assert helper._session is not session


def test_answers_find_their_requests_in_any_order(helper: Helper) -> None:
    begun = threading.Barrier(9)

    def ask(number: int) -> int:
        begun.wait(60)
        found: int = helper.request("create", {"do": "hold", "n": number}, soon())["n"]
        return found

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number) for number in range(8)]
        begun.wait(60)
        # Again until all have been held: which of them has been sent is not told to us.
        while not all(one.done() for one in asked):
            helper.request("create", {"do": "release"}, soon())
    assert [one.result() for one in asked] == list(range(8))


def test_what_the_helper_says_on_stderr_cannot_block_it(helper: Helper) -> None:
    assert helper.request("pools", {"do": "shout"}, soon())["do"] == "shout"


def test_one_connection_serves_all_threads(helper: Helper) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(helper.request, "pools", {"n": n}, soon()) for n in range(40)]
    assert [one.result()["n"] for one in asked] == list(range(40))


def test_the_command_is_a_constant_of_ours(sshd: Sshd) -> None:
    seen: list[str] = []
    connection = sshd.connection()

    def channel(deadline: Deadline, command: str) -> Any:
        seen.append(command)
        return connection.channel(deadline, command)

    sshd.set_command(f"{sys.executable} {FAKE}")
    helper = Helper(open_channel=channel, host="storage", sudo=True, installed=True)
    with contextlib.closing(helper):
        helper.request("create", {"name": "$(reboot)", "password": "a secret"}, soon())
    assert seen == ["sudo -n -- /usr/local/libexec/external-storage-lio"]
    assert shlex.split(seen[0])[:3] == ["sudo", "-n", "--"]
