"""What a key of ours may do on a storage host: run the helper, or lead to targetd."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest
from tests.sshd import Sshd, soon
from tests.targetd_server import TargetdServer, unused_port
from tests.test_targetd_backend import ACCOUNT

from external_storage import (
    Unchanged,
)
from iscsi_targetd_provisioner import cli
from iscsi_targetd_provisioner.__main__ import main
from iscsi_targetd_provisioner.rpc import Rpc

# -- a key that may run the helper, and nothing else


@pytest.fixture
def installed(
    sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Path]:
    """The helper is on the host, and the key's line is the one that ``install-helper`` prints."""
    helper = tmp_path / "external-storage-lio"
    monkeypatch.setattr(cli, "INSTALLED_PATH", str(helper))
    argv = ["install-helper", f"--output={helper}", "--user=root", "--pool=vg/thin"]
    key = (sshd.directory / "key.pub").read_text().strip()
    with pytest.raises(SystemExit) as ended:
        main([*argv, f"--key={key}"])
    assert ended.value.code == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.endswith(key)]
    assert line == f'command="{helper} --pool vg/thin",restrict {key}'
    assert helper.stat().st_mode & 0o777 == 0o755
    with sshd.allowed(line):
        yield helper


def output(channel: paramiko.Channel) -> str:
    text = b""
    while data := channel.recv(1 << 16):
        text += data
    return text.decode()


def test_an_installed_helper_is_all_that_its_key_can_run(
    sshd: Sshd, installed: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    connection = sshd.connection()
    for command in (str(installed), f"touch {made}", f"{installed}; touch {made}", "sh -i"):
        said = json.loads(output(connection.channel(soon(), command)).splitlines()[0])
        # Which of the two depends on whether this machine has LIO.
        assert said.keys() <= {"hello", "fatal"}, command
    transport = connection._transport(soon())
    shell = transport.open_session(timeout=60)
    with pytest.raises(paramiko.SSHException):
        shell.get_pty()
    shell = transport.open_session(timeout=60)
    shell.invoke_shell()
    shell.shutdown_write()
    assert output(shell).startswith("{")
    files = transport.open_session(timeout=60)
    files.invoke_subsystem("sftp")
    assert output(files).startswith("{")
    assert not made.exists()


def test_its_key_opens_no_way_to_elsewhere(
    sshd: Sshd, installed: Path, targetd: TargetdServer
) -> None:
    assert installed.exists()
    with pytest.raises(Unchanged, match="no tunnel to"):
        sshd.connection().tunnel(soon(), ("127.0.0.1", targetd.port))


def test_the_key_of_a_tunnel_leads_to_targetd_and_nowhere_else(
    sshd: Sshd, targetd: TargetdServer
) -> None:
    """The line that the README gives."""
    key = (sshd.directory / "key.pub").read_text().strip()
    where = f"127.0.0.1:{targetd.port}"
    line = f'restrict,port-forwarding,permitopen="{where}",command="/bin/false" {key}'
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert line.removesuffix(key).replace(where, "127.0.0.1:18700") in readme
    with sshd.allowed(line):
        connection = sshd.connection()
        rpc = Rpc(
            host="storage",
            account=ACCOUNT,
            open_stream=lambda deadline: connection.tunnel(deadline, ("127.0.0.1", targetd.port)),
        )
        assert rpc.call("pool_list", soon(), changes=False)
        with pytest.raises(Unchanged, match="no tunnel to"):
            connection.tunnel(soon(), ("127.0.0.1", sshd.port))
        assert output(connection.channel(soon(), "echo no")) == ""


# -- targetd through a tunnel


def test_targetd_is_reached_through_a_tunnel(sshd: Sshd, targetd: TargetdServer) -> None:
    sshd.set_command("false")
    connection = sshd.connection()
    rpc = Rpc(
        host="storage",
        account=ACCOUNT,
        open_stream=lambda deadline: connection.tunnel(deadline, ("127.0.0.1", targetd.port)),
    )
    for _ in range(3):
        pools = rpc.call("pool_list", soon(), changes=False)
        assert {"vg-targetd", "fast/thin"} <= {pool["name"] for pool in pools}
    connection.close()


def test_a_tunnel_to_nobody_is_told(sshd: Sshd) -> None:
    sshd.set_command("false")
    connection = sshd.connection()
    where = ("127.0.0.1", unused_port())
    with pytest.raises(Unchanged, match=r"no tunnel to 127\.0\.0\.1"):
        connection.tunnel(soon(), where)
    connection.close()
