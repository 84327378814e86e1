"""A guest from its saved state: commands, files, programs, network, and that nothing is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import pytest

from external_storage.testing import CommandFailed, ControlPlane, Guest, GuestError
from external_storage.testing.guest import image
from external_storage.testing.processes import is_running
from external_storage.testing.waiting import wait_until

LIB = Path(__file__).parents[2]
# Starts a guest, says its process id and where its files are, and waits to be killed.
OWNER = """
import sys, time
from external_storage.testing import Guest
with Guest() as guest:
    print(guest.pid, guest.directory, flush=True)
    sys.stdin.read()
"""


def test_a_command_gives_its_output(guest: Guest) -> None:
    assert guest.run("echo $((20 + 1)) | tr 1 2") == "22\n"
    assert guest.run(["printf", "%s|", "a b", "$HOME"]) == "a b|$HOME|"
    assert guest.run("cat", input="häl\n") == "häl\n"


def test_a_failed_command_says_what_and_why(guest: Guest) -> None:
    with pytest.raises(CommandFailed, match=r"`ls /nowhere` exited with 2: .*No such file") as info:
        guest.run("ls /nowhere")
    assert info.value.exit_code == 2
    assert guest.run("echo so; exit 3", check=False) == "so\n"
    assert guest.execute("exit 255").returncode == 255


def test_a_command_that_hangs_is_given_up(guest: Guest) -> None:
    with pytest.raises(GuestError, match=r"`echo begun; sleep 1234` has not ended.*\n?.*begun"):
        guest.run("echo begun; sleep 1234", timeout_s=3)
    guest.run("pkill -f 'sleep 1234'")


def test_what_a_command_waits_for_in_the_kernel_is_told(guest: Guest) -> None:
    disk = guest.add_disk()
    device = guest.path(disk)
    guest.run(f"mkfs.ext4 -q {device} && mkdir -p /mnt/frozen && mount {device} /mnt/frozen")
    guest.run("fsfreeze --freeze /mnt/frozen")
    with pytest.raises(
        GuestError, match=r"(?s)tasks that wait .* touch\n.*sb_start_write|mnt_want"
    ):
        guest.run("touch /mnt/frozen/file", timeout_s=5)
    guest.run("fsfreeze --unfreeze /mnt/frozen && umount /mnt/frozen")
    guest.remove_disk(disk)


def test_its_clock_is_the_hosts(guest: Guest) -> None:
    before = time.time()
    inside = float(guest.run("date +%s.%N"))
    # It is set once, at the start, by a command that itself takes a while on a busy machine.
    assert before - 30 < inside < time.time() + 1


def test_two_guests_do_not_share_random_numbers(guest: Guest) -> None:
    with Guest(name="other") as other:
        assert other.run("hostname") == "other\n"
        assert other.pid != guest.pid
        numbers = {g.run("head -c 16 /dev/urandom | od -An -tx1") for g in (guest, other)}
    assert len(numbers) == 2


def test_files_are_copied_both_ways(guest: Guest, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "tree/below").mkdir(parents=True)
    (tmp_path / "tree/below/it's").write_bytes(content)
    (tmp_path / "tree/program").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "tree/program").chmod(0o755)
    guest.put(tmp_path / "tree", "/root/copied/tree")
    guest.put(tmp_path / "tree/program", "/root/copied/alone/program")
    assert guest.run("/root/copied/tree/program && /root/copied/alone/program") == "ran\nran\n"
    guest.get("/root/copied/tree/below/it's", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content
    with pytest.raises(GuestError, match="No such file"):
        guest.get("/root/none", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_program_is_started_watched_and_ended(guest: Guest) -> None:
    program = guest.popen(["sh", "-c", 'echo "$WORD"; exec sleep 1000'], env={"WORD": "two words"})
    assert program.exit_code is None
    wait_until(lambda: program.output() == "two words\n", "its output is in the log")
    program.terminate()
    assert program.wait() == -signal.SIGTERM
    program.kill()  # nothing: it has ended
    assert guest.popen(["sh", "-c", "exit 7"]).wait() == 7
    missing = guest.popen(["no-such-program"])
    assert missing.wait() == 127
    assert "no-such-program" in missing.output()


def test_kill_ends_what_a_program_has_started(guest: Guest) -> None:
    program = guest.popen(["sh", "-c", "sleep 4321 & wait"])
    wait_until(lambda: guest.run("pgrep -f 'sleep [4]321'", check=False), "its child runs")
    program.kill()
    assert program.wait() == -signal.SIGKILL
    assert guest.run("pgrep -f 'sleep [4]321'", check=False) == ""


def test_our_packages_run_inside(guest: Guest) -> None:
    guest.install(LIB)
    lines = guest.run(
        "python3 -c 'import external_storage as e, pycurl; print(e.__file__, pycurl.version)'"
    )
    assert lines.startswith("/opt/site/external_storage/__init__.py PycURL")


def test_the_hosts_control_plane_is_reached(guest: Guest, control_plane: ControlPlane) -> None:
    guest.install(LIB)
    kubeconfig = guest.kubeconfig(control_plane.kubeconfig)
    program = (
        "import sys; from external_storage.kube import auth; "
        "from external_storage.kube.client import Client; "
        "from external_storage.kube.types import StorageClass; "
        "client = Client(auth.load(kubeconfig=sys.argv[1])); "
        "print(client.get(StorageClass, sys.argv[2]).provisioner)"
    )
    name = f"guest-{uuid.uuid4().hex[:8]}"
    collection = "/apis/storage.k8s.io/v1/storageclasses"
    body = {"metadata": {"name": name}, "provisioner": "example.com/guest"}
    control_plane.request("POST", collection, body)
    try:
        said = guest.run(["python3", "-c", program, kubeconfig, name], timeout_s=120)
        assert said == "example.com/guest\n"
    finally:
        control_plane.request("DELETE", f"{collection}/{name}")


def test_a_forwarded_port_leads_inside(guest: Guest) -> None:
    guest.run("mkdir -p /root/www && echo inside > /root/www/x")
    server = guest.popen(["busybox", "httpd", "-f", "-p", "8080", "-h", "/root/www"])
    port = guest.forward(8080)
    assert guest.forward(8080) == port
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def answer() -> bytes:
        try:
            with opener.open(f"http://127.0.0.1:{port}/x", timeout=10) as response:
                content: bytes = response.read()
        except OSError:
            return b""
        return content

    wait_until(lambda: answer() == b"inside\n", "the guest's server answers")
    server.kill()


def test_a_cut_network_is_cut_and_commands_go_on(guest: Guest, control_plane: ControlPlane) -> None:
    reach = f"timeout 10 bash -c '</dev/tcp/{guest.host}/{control_plane.port}'"
    guest.run(reach)
    guest.cut_network()
    try:
        assert guest.execute(reach).returncode != 0
    finally:
        guest.mend_network()
    wait_until(lambda: guest.execute(reach).returncode == 0, "the network is there again")


def test_memory_is_below_700_mib(guest: Guest) -> None:
    status = Path(f"/proc/{guest.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    assert int(found[1]) < 700 * 1024


def test_stopping_leaves_nothing() -> None:
    with Guest() as other:
        pid, directory = other.pid, other.directory
        assert is_running(pid)
    assert not is_running(pid)
    assert not directory.exists()
    with pytest.raises(GuestError, match="has not been started"):
        other.run("true")


def test_killing_the_parent_ends_the_machine_and_the_next_start_clears_up() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        try:
            assert owner.stdout is not None
            pid, directory = owner.stdout.readline().split()
        finally:
            owner.kill()
    wait_until(lambda: not is_running(int(pid)), "QEMU has ended")
    with Guest():
        assert not Path(directory).exists()


def test_missing_programs_are_named_with_their_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        GuestError, match=r"qemu-img, ssh, tar; .* openssh-client qemu-system-x86 q"
    ):
        image.need(image.RUN_PROGRAMS)


def test_a_guest_that_dies_says_how() -> None:
    with Guest() as other:
        with pytest.raises(GuestError, match=r"(?s)QEMU exited with 0.*console.*Kernel panic"):
            other.run("echo c > /proc/sysrq-trigger; sleep 60")
        assert not other.running
