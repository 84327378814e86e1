"""From start to end: several at once, power cuts, state that is kept; and no trace afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from external_storage.testing import Cluster, ClusterError
from external_storage.testing.cluster import requirements
from external_storage.testing.processes import die_with_parent
from external_storage.testing.waiting import wait_until

from .conftest import WAIT, Traces, pod

OWNER = """
import sys, time
from external_storage.testing import Cluster
with Cluster() as running:
    print(running.directory, running.pids["kubelet"], flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def state() -> Iterator[Path]:
    """A directory for a cluster's state; not in pytest's own, which keeps the last three."""
    path = Path(tempfile.mkdtemp(prefix="external-storage-test-"))
    yield path
    shutil.rmtree(path)


def test_one_beside_another_survives_a_power_cut_keeps_its_state_and_leaves_no_trace(
    cluster: Cluster, state: Path
) -> None:
    privileged = {"securityContext": {"privileged": True}}
    # A loop device that nobody detaches, as a killed pod leaves it.
    script = "dd if=/dev/zero of=/tmp/disk bs=1M count=1 && losetup -f /tmp/disk && sleep 1000"
    with Cluster(state=state) as other:
        assert other.directory != cluster.directory
        assert other.port != cluster.port
        traces = Traces.of(other.directory, other.pids["kubelet"])
        with pytest.raises(ClusterError, match=f"another cluster is running .* {state}"):
            Cluster(state=state).start()
        other.kubectl("apply", "-f", "-", input=pod("a", script, container=privileged))
        other.kubectl("wait", "--for=condition=Ready", "pod/a", WAIT)
        assert cluster.kubectl("get", "pods", "--ignore-not-found") == ""
        port = other.port
        assert len(loops_below(state)) == 1
        other.restart()
        assert other.port == port
        count = ("get", "pod", "a", "-o", "jsonpath={.status.containerStatuses[0].restartCount}")
        wait_until(lambda: other.kubectl(*count) == "1", "the pod is started again")
        other.kubectl("wait", "--for=condition=Ready", "pod/a", WAIT)
        restarted = Traces.of(other.directory, other.pids["kubelet"])
    assert traces.left() == []
    assert restarted.left() == []
    assert loops_below(state) == []
    with Cluster(state=state) as again:
        assert again.kubectl("get", "pod", "a", "-o", "name") == "pod/a\n"
    assert cluster.kubectl("get", "--raw", "/readyz") == "ok"


def loops_below(directory: Path) -> list[str]:
    """The loop devices on files of that directory, found by inode: their paths were a pod's."""
    inodes = {
        os.lstat(f"{top}/{name}").st_ino for top, _, names in os.walk(directory) for name in names
    }
    argv = ["losetup", "--noheadings", "--raw", "--output", "NAME,BACK-INO"]
    lines = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if int(line.split()[1]) in inodes]


def test_a_killed_owner_leaves_nothing() -> None:
    owner = subprocess.Popen(
        die_with_parent([sys.executable, "-c", OWNER]), stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout is not None
        directory, kubelet = owner.stdout.readline().split()
        traces = Traces.of(Path(directory), int(kubelet))
        assert traces.left() != []
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    wait_until(lambda: not traces.left(), "all of it is gone", explain=traces.left)


def test_what_is_missing_is_told_all_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    monkeypatch.setattr(requirements, "_FREE_MIB", 1 << 40)
    monkeypatch.setattr(requirements, "find", lambda name: None if name == "runc" else "/bin/true")
    with pytest.raises(ClusterError) as caught:
        requirements.check(tmp_path)
    assert "run as root, not as user 4711" in str(caught.value)
    assert "missing: runc; run: apt-get install --no-install-recommends runc" in str(caught.value)
    assert f"{tmp_path} has " in str(caught.value)
    assert "MiB are needed" in str(caught.value)
