"""Kernel mounts in a virtual machine, of NFS-Ganesha on the host and of the guest's own kernel.

One provisioner runs in the guest, on four servers: one that hangs when it is told to, one that
behaves, one that squashes root, and one that is read-only.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from external_storage import PersistentVolume, StorageClass
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.testing import ControlPlane, Guest, Sandbox
from external_storage.testing.processes import ProcessGroup, free_port
from external_storage.testing.waiting import wait_until

# An emulated guest is some ten times slower than its host, and the host may be busy.
pytestmark = pytest.mark.timeout(900)
LIMIT_S = 400.0

PACKAGES = Path(__file__).parents[3] / "lib", Path(__file__).parents[2]
CALL_TIMEOUT_S = 10
GANESHA = """
NFS_CORE_PARAM {{ Protocols = 4; NFS_Port = {port}; Bind_addr = 127.0.0.1;
  Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false; }}
NFSv4 {{ Graceless = true; RecoveryBackend = fs_ng; RecoveryRoot = {root}/recovery;
  Only_Numeric_Owners = true; }}
EXPORT {{ Export_Id = 1; Path = {root}/export; Pseudo = /ganesha; Access_Type = RW; Protocols = 4;
  Squash = No_Root_Squash; SecType = sys; Transports = TCP; FSAL {{ Name = VFS; }} }}
"""


@dataclass(frozen=True, kw_only=True)
class Ganesha:
    """NFS-Ganesha on the host, which the guest reaches as its host."""

    pid: int
    port: int
    export: Path


@pytest.fixture(scope="module")
def ganesha(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ganesha]:
    if os.geteuid() != 0 or shutil.which("ganesha.nfsd") is None:
        pytest.skip("NFS-Ganesha is needed, as root: apt-get install nfs-ganesha nfs-ganesha-vfs")
    root = tmp_path_factory.mktemp("ganesha")
    (root / "export").mkdir()
    (root / "recovery").mkdir()
    port = free_port()
    (root / "ganesha.conf").write_text(GANESHA.format(port=port, root=root))
    processes = ProcessGroup(root)
    files = ["-f", "ganesha.conf", "-p", "ganesha.pid", "-L", str(root / "server.log")]
    try:
        started = processes.start("ganesha", ["ganesha.nfsd", "-F", *files])
        yield Ganesha(pid=started.pid, port=port, export=root / "export")
    finally:
        processes.kill_all()


@pytest.fixture(scope="module")
def servers(guest: Guest, ganesha: Ganesha) -> Iterator[dict[str, dict[str, Any]]]:
    """The provisioner's file of servers; all are mounted where it says."""
    own = guest.run("hostname -I").split()[0]
    exports = {"kernel": "rw", "squashing": "rw,root_squash", "readonly": "ro"}
    for name, options in exports.items():
        squash = "" if "squash" in options else ",no_root_squash"
        guest.serve_nfs(f"/srv/{name}", options=f"{options},sync{squash}")
    made: dict[str, dict[str, Any]] = {
        name: {"server": own, "path": f"/srv/{name}"} for name in exports
    }
    port = f"port={ganesha.port}"
    made["ganesha"] = {"server": guest.host, "path": "/ganesha", "mountOptions": [port]}
    guest.run("chown nobody /srv/squashing")
    mounted = []
    try:
        for name, entry in made.items():
            point = f"/persistentvolumes/{name}"
            # Hard, as a kubelet mounts: a call on a server that hangs never comes back by itself.
            words = ["hard", *entry.get("mountOptions", [])]
            mount_there(guest, entry["server"], entry["path"], point, words)
            mounted.append(point)
        yield made
    finally:
        for point in mounted:
            guest.run(["umount", "-f", "-l", point])


def mount_there(guest: Guest, server: str, path: str, point: str, options: list[str]) -> None:
    guest.run(["mkdir", "-p", point])
    words = ",".join(["nfsvers=4.1", *options])
    mount = ["mount", "-t", "nfs4", "-o", words, f"{server}:{path}", point]
    # A server that was started a moment ago refuses at first.
    wait_until(
        lambda: guest.execute(mount, timeout_s=120).returncode == 0, f"{server}:{path} is mounted"
    )


@pytest.fixture(scope="module")
def provisioner(
    guest: Guest, servers: dict[str, dict[str, Any]], control_plane: ControlPlane
) -> Iterator[str]:
    """Its name; it runs in the guest."""
    guest.install(*PACKAGES)
    guest.run("cat > /root/servers.yaml", input=yaml.safe_dump({"servers": servers}))
    kubeconfig = guest.kubeconfig(control_plane.kubeconfig)
    name = "example.com/in-the-guest"
    flags = {
        "--provisioner-name": name,
        "--servers": "/root/servers.yaml",
        "--kubeconfig": kubeconfig,
        "--call-timeout": f"{CALL_TIMEOUT_S}s",
        "--retry-interval-max": "5s",
        "--leader-elect": "false",
        "--http-endpoint": "127.0.0.1:8099",
        "--usage-interval": "0",
    }
    program = guest.popen(
        ["nfs-client-provisioner", *(f"{key}={value}" for key, value in flags.items())]
    )
    try:
        yield name
    finally:
        program.terminate()
        code = program.wait()
        print(program.output())
    assert code == 0


@pytest.fixture
def cluster(control_plane: ControlPlane, namespace: str, provisioner: str) -> Iterator[Sandbox]:
    api = Client(auth.load(kubeconfig=str(control_plane.kubeconfig)))
    made = Sandbox(api=api, namespace=namespace, provisioner=provisioner, limit_s=LIMIT_S)
    yield made
    made.delete_claims()
    made.wait(lambda: not made.volumes(), "all volumes are gone")
    made.clean_up()
    api.close()


def on(cluster: Sandbox, server: str, **parameters: str) -> StorageClass:
    """A class of a server."""
    wanted = {"server": server, "onDelete": "delete", **parameters}
    return cluster.storage_class(f"-{server}", parameters=wanted)


def source(volume: PersistentVolume) -> tuple[str, str]:
    assert volume.spec.nfs is not None
    return volume.spec.nfs.server, volume.spec.nfs.path


def in_volume(guest: Guest, volume: PersistentVolume, script: str) -> str:
    """What a command prints in the volume, mounted by its own server and path as a kubelet does."""
    server, path = source(volume)
    # A hung server must not hang the test's own commands for long.
    soft = ["soft", "timeo=100", "retrans=1"]
    mount_there(guest, server, path, "/mnt/volume", [*soft, *volume.spec.mount_options])
    try:
        return guest.run(f"cd /mnt/volume && {script}")
    finally:
        guest.run(["umount", "/mnt/volume"])


def event_says(cluster: Sandbox, claim: str, *words: str) -> None:
    def said() -> bool:
        return any(all(word in event.message for word in words) for event in cluster.events(claim))

    cluster.wait(said, f"an event about {claim} says {' ... '.join(words)}")


@pytest.mark.parametrize("server", ["ganesha", "kernel"])
def test_what_is_written_to_a_volume_is_on_the_server(
    cluster: Sandbox, guest: Guest, ganesha: Ganesha, server: str
) -> None:
    cluster.claim("data", on(cluster, server))
    (volume,) = cluster.wait_bound("data")
    in_volume(guest, volume, "echo written > file && sync file")
    assert in_volume(guest, volume, "cat file") == "written\n"
    name = source(volume)[1].rpartition("/")[2]
    if server == "ganesha":
        assert (ganesha.export / name / "file").read_text() == "written\n"
        assert (ganesha.export / name).stat().st_mode & 0o7777 == 0o2770
    else:
        assert guest.run(f"cat /srv/kernel/{name}/file") == "written\n"
    cluster.delete_claims()
    cluster.wait(lambda: cluster.get_volume(volume.name) is None, "the volume is gone")
    shown = [path.name for path in ganesha.export.iterdir() if path.name[0] != "."]
    assert shown == []
    assert guest.run("ls /srv/kernel") == ""


def test_a_server_that_hangs_holds_up_its_own_claims_only_and_comes_back(
    cluster: Sandbox, guest: Guest, ganesha: Ganesha
) -> None:
    hanging, well = on(cluster, "ganesha"), on(cluster, "kernel")
    os.kill(ganesha.pid, signal.SIGSTOP)
    try:
        cluster.claim("waits", hanging)
        event_says(cluster, "waits", "share 'ganesha'", "not answered for")
        names = [f"goes-on-{number}" for number in range(3)]
        cluster.claims_at_once(names, well)
        cluster.wait_bound(*names)
        assert cluster.get_claim("waits").spec.volume_name == ""
        metrics = guest.run("busybox wget -q -O - http://127.0.0.1:8099/metrics")
        kills = 'external_storage_share_worker_kills_total{share="ganesha"}'
        (line,) = [line for line in metrics.splitlines() if line.startswith(kills)]
        assert float(line.split()[-1]) >= 1
        # The pod is ready all the same, on purpose: it serves no data, and the others' claims.
        ready = guest.run("busybox wget -q -O - 'http://127.0.0.1:8099/readyz?verbose'")
        assert "[-]" not in ready
    finally:
        os.kill(ganesha.pid, signal.SIGCONT)
    (volume,) = cluster.wait_bound("waits")
    assert in_volume(guest, volume, "pwd") == "/mnt/volume\n"


def test_a_server_that_squashes_root_is_told_and_can_be_used_without_owners(
    cluster: Sandbox, guest: Guest
) -> None:
    cluster.claim("owned", on(cluster, "squashing"))
    event_says(cluster, "owned", "Operation not permitted", "root_squash", "no_root_squash")
    assert guest.run("ls /srv/squashing") == ""
    other = cluster.storage_class("-plain", parameters={"server": "squashing", "gid": "none"})
    cluster.claim("plain", other)
    (volume,) = cluster.wait_bound("plain")
    assert in_volume(guest, volume, "echo written > file && cat file") == "written\n"
    cluster.delete_claims("owned")


def test_a_read_only_server_is_told_and_its_claims_wait(cluster: Sandbox, guest: Guest) -> None:
    cluster.claim("data", on(cluster, "readonly"))
    event_says(cluster, "data", "share 'readonly'", "Read-only file system")
    guest.serve_nfs("/srv/readonly", options="rw,sync,no_root_squash")
    try:
        (volume,) = cluster.wait_bound("data")
        assert in_volume(guest, volume, "echo written > file && cat file") == "written\n"
    finally:
        cluster.delete_claims()
        cluster.wait(lambda: not cluster.volumes(), "the volume is gone")
        guest.serve_nfs("/srv/readonly", options="ro,sync,no_root_squash")


def test_n27_a_file_that_is_open_is_removed_when_it_is_closed(
    cluster: Sandbox, guest: Guest
) -> None:
    """The kernel renames it to .nfsXXXX, which cannot be removed while it is open."""
    storage_class = on(cluster, "kernel")
    cluster.claim("data", storage_class)
    (volume,) = cluster.wait_bound("data")
    name = source(volume)[1].rpartition("/")[2]
    hold = f"exec 3> /persistentvolumes/kernel/{name}/held; sleep 1000"
    holder = guest.popen(["sh", "-c", hold])
    wait_until(lambda: guest.run(f"ls /srv/kernel/{name}").split() == ["held"], "it is open")
    try:
        cluster.delete_claims()
        cluster.wait(lambda: cluster.get_volume(volume.name) is None, "the volume is gone")
        told = "busybox wget -q -O - 'http://127.0.0.1:8099/healthz?verbose'"
        wait_until(lambda: "deleted data cannot be removed" in guest.run(told), "it is told")
        assert guest.run("find /srv/kernel -name '.nfs*'").count(".nfs") == 1
    finally:
        holder.kill()
    # The next deletion takes it along.
    cluster.claim("next", storage_class)
    cluster.wait_bound("next")
    cluster.delete_claims("next")
    trash = "ls -A /srv/kernel/.external-storage/trash"
    wait_until(lambda: guest.run(trash) == "", "the trash is empty")
