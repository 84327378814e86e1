"""The control plane the other tests stand on: it is real, and it leaves nothing behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from external_storage.testing import ControlPlane, ControlPlaneError, controlplane
from external_storage.testing.binaries import NAMES, ensure
from external_storage.testing.processes import WorkDirectory, free_port, is_running, sweep

PREFIX = "external-storage-controlplane-"
LIMIT_S = 60.0

# Starts a control plane and prints what it started; then waits to be killed.
OWNER = """
import json, signal, sys
from external_storage.testing import ControlPlane

with ControlPlane() as running:
    print(json.dumps({"pids": running.pids, "directory": str(running.directory)}), flush=True)
    signal.pause()
"""


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    """Bounded, and much longer than it takes: no test here is about speed."""
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline, f"waited {LIMIT_S} s for {what}"
        time.sleep(0.02)


def gone(pids: dict[str, int]) -> bool:
    return not any(is_running(pid) for pid in pids.values())


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[str]]:
    """Another process, which owns a control plane of its own."""
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def volume_and_claim(name: str) -> tuple[str, str]:
    """A volume and a claim, as JSON, that fit each other and nothing else."""
    common = {"storageClassName": name, "accessModes": ["ReadWriteOnce"]}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {**common, "capacity": {"storage": "1Gi"}, "hostPath": {"path": "/srv/volume"}},
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "claim", "namespace": name},
        "spec": {**common, "resources": {"requests": {"storage": "1Gi"}}},
    }
    return json.dumps(volume), json.dumps(claim)


def wait_for_phase(control_plane: ControlPlane, phase: str, *what: str) -> None:
    until = f"--for=jsonpath={{.status.phase}}={phase}"
    control_plane.kubectl("wait", until, f"--timeout={LIMIT_S:.0f}s", *what, limit_s=2 * LIMIT_S)


def test_is_ready_with_default_service_account_and_root_ca(control_plane: ControlPlane) -> None:
    assert control_plane.kubectl("get", "--raw", "/readyz") == "ok"
    names = control_plane.kubectl("get", "sa/default", "cm/kube-root-ca.crt", "-o", "name")
    assert names.split() == ["serviceaccount/default", "configmap/kube-root-ca.crt"]
    assert set(control_plane.pids) == {"etcd", "kube-apiserver", "kube-controller-manager"}
    assert control_plane.url == f"https://127.0.0.1:{control_plane.port}"


def test_the_real_binder_binds_a_claim(control_plane: ControlPlane, namespace: str) -> None:
    volume, claim = volume_and_claim(namespace)
    control_plane.kubectl("create", "-f", "-", input=volume)
    try:
        # The binder looks for volumes when it sees the claim, and then again every 15 s only.
        wait_for_phase(control_plane, "Available", f"pv/{namespace}")
        control_plane.kubectl("create", "-f", "-", input=claim)
        wait_for_phase(control_plane, "Bound", "pvc/claim", "-n", namespace)
        bound = control_plane.request("GET", f"/api/v1/persistentvolumes/{namespace}")
        assert bound["spec"]["claimRef"]["namespace"] == namespace
        assert bound["status"]["phase"] == "Bound"
    finally:
        control_plane.kubectl("delete", "pv", namespace, "--wait=false")


def test_a_service_account_is_itself_and_may_do_nothing(
    control_plane: ControlPlane, namespace: str
) -> None:
    control_plane.kubectl("create", "serviceaccount", "worker", "-n", namespace)
    kubeconfig = control_plane.service_account_kubeconfig(namespace, "worker")
    answer = control_plane.kubectl("auth", "whoami", "-o", "json", kubeconfig=kubeconfig)
    user = json.loads(answer)["status"]["userInfo"]
    assert user["username"] == f"system:serviceaccount:{namespace}:worker"
    with pytest.raises(ControlPlaneError, match="Forbidden"):
        control_plane.kubectl("get", "persistentvolumes", kubeconfig=kubeconfig)


def test_no_token_for_a_service_account_that_is_not_there(
    control_plane: ControlPlane, namespace: str
) -> None:
    with pytest.raises(ControlPlaneError, match=r'404 .*serviceaccounts \\"nobody\\" not found'):
        control_plane.service_account_token(namespace, "nobody")


def test_the_audit_log_names_user_and_outcome(control_plane: ControlPlane, namespace: str) -> None:
    control_plane.kubectl("create", "serviceaccount", "worker", "-n", namespace)
    kubeconfig = control_plane.service_account_kubeconfig(namespace, "worker")
    with pytest.raises(ControlPlaneError, match="Forbidden"):
        control_plane.kubectl("get", "persistentvolumes", kubeconfig=kubeconfig)
    events = [
        event
        for event in control_plane.audit_events()
        if event["user"]["username"] == f"system:serviceaccount:{namespace}:worker"
        and event["objectRef"]["resource"] == "persistentvolumes"
    ]
    assert [(e["verb"], e["stage"], e["responseStatus"]["code"]) for e in events] == [
        ("list", "ResponseComplete", 403)
    ]


def test_outage_of_the_api_server_starts_refused_connections_and_keeps_data() -> None:
    with ControlPlane() as running:
        running.kubectl("create", "configmap", "kept", "--from-literal=key=value")
        url, others = running.url, running.pids
        del others["kube-apiserver"]
        running.stop_apiserver()
        assert running.pids == others
        with pytest.raises(OSError, match="refused"):
            running.request("GET", "/readyz")
        running.start_apiserver()
        assert running.url == url
        assert running.kubectl("get", "cm/kept", "-o", "jsonpath={.data.key}") == "value"
        with pytest.raises(ControlPlaneError, match="no audit log"):
            running.audit_events()


def test_scheduler_on_request_and_nothing_left_behind() -> None:
    running = ControlPlane(scheduler=True)
    running.start()
    pids, directory = running.pids, running.directory
    assert set(pids) == {name for name in NAMES if name != "kubectl"}
    with pytest.raises(ControlPlaneError, match="already running"):
        running.start()
    running.stop()
    assert gone(pids)
    assert not directory.exists()
    running.stop()  # again: nothing to do
    with pytest.raises(ControlPlaneError, match="not running"):
        running.kubectl("get", "ns")


def test_nothing_left_behind_after_an_interrupt(owner: subprocess.Popen[str]) -> None:
    assert owner.stdout is not None
    started = json.loads(owner.stdout.readline())
    owner.send_signal(signal.SIGINT)
    assert owner.wait(LIMIT_S) != 0
    assert gone(started["pids"])
    assert not Path(started["directory"]).exists()


def test_nothing_left_running_after_its_owner_was_killed(
    owner: subprocess.Popen[str], control_plane: ControlPlane
) -> None:
    assert owner.stdout is not None
    started = json.loads(owner.stdout.readline())
    directory = Path(started["directory"])
    sweep(PREFIX)
    assert directory.exists(), "the owner is alive"
    owner.kill()
    owner.wait(LIMIT_S)
    wait_until(lambda: gone(started["pids"]), "the kernel to kill the processes")
    # As the next start does.
    assert directory in sweep(PREFIX)
    assert not directory.exists()
    assert control_plane.kubeconfig.exists()


def test_a_directory_in_the_making_is_not_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "swept-new").mkdir()
    stale = tmp_path / "swept-stale"
    stale.mkdir()
    (stale / "owner").write_text("1\n")
    (tmp_path / "swept-link").symlink_to(stale)
    mine = WorkDirectory("swept-")
    assert not stale.exists()
    assert sweep("swept-") == []
    assert sorted(tmp_path.glob("swept-*")) == sorted(
        [mine.path, tmp_path / "swept-new", tmp_path / "swept-link"]
    )
    mine.remove()
    assert not mine.path.exists()


@pytest.fixture
def broken_apiserver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real programs, but for an API server that complains and ends."""
    for name, path in ensure().paths.items():
        (tmp_path / name).symlink_to(path)
    (tmp_path / "kube-apiserver").unlink()
    (tmp_path / "kube-apiserver").write_text("#!/bin/sh\necho 'unknown flag: --boom'\nexit 3\n")
    (tmp_path / "kube-apiserver").chmod(0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))


@pytest.mark.usefixtures("broken_apiserver")
def test_a_failed_start_names_the_process_and_shows_its_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directories = []

    class Recorded(WorkDirectory):
        def __init__(self, prefix: str) -> None:
            super().__init__(prefix)
            directories.append(self.path)

    monkeypatch.setattr(controlplane, "WorkDirectory", Recorded)
    with pytest.raises(ControlPlaneError) as caught, ControlPlane():
        pass
    assert "kube-apiserver exited with 3" in str(caught.value)
    assert str(caught.value).endswith("unknown flag: --boom")
    assert not directories[0].exists()
    assert not processes_in(directories[0])


def processes_in(directory: Path) -> list[int]:
    """The processes that have ``directory``, though removed, as their working directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(process / "cwd").startswith(str(directory)):  # noqa: PTH115
                found.append(int(process.name))
    return found


def test_a_port_taken_by_another_is_chosen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        # The first start finds etcd's port taken, the second the API server's.
        ports = iter([taken, free_port(), free_port(), free_port(), free_port(), taken])
        monkeypatch.setattr(controlplane, "free_port", lambda: next(ports, None) or free_port())
        with ControlPlane() as running:
            assert running.port != taken
            assert list(ports) == []
