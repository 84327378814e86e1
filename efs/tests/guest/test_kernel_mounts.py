"""Kernel mounts in a virtual machine: NFS-Ganesha on the host, over NFS 4.1, in EFS's place.

The provisioner runs in the guest, where a directory of the server is mounted for it; it is to find
that by the server's name, as efs-provisioner did. AWS's place has the fault layer on the host.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from external_storage import PersistentVolume, StorageClass
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.names import ANN_GID
from external_storage.testing import ControlPlane, Guest, Sandbox
from external_storage.testing.guest.programs import GuestProcess
from external_storage.testing.processes import ProcessGroup, free_port
from external_storage.testing.waiting import wait_until

if TYPE_CHECKING:
    from tests.faulty_efs import FaultyEfs

# An emulated guest is some ten times slower than its host, and the host may be busy.
pytestmark = pytest.mark.timeout(900)
LIMIT_S = 400.0

PACKAGES = Path(__file__).parents[3] / "lib", Path(__file__).parents[2]
NAME = "example.com/in-the-guest"
POINT = "/persistentvolumes"
MOUNTED = "/ganesha/volumes"
PRIVATE = ".external-storage"
GANESHA = """
NFS_CORE_PARAM {{ Protocols = 4; NFS_Port = {port}; Bind_addr = 127.0.0.1;
  Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false; }}
NFSv4 {{ Graceless = true; RecoveryBackend = fs_ng; RecoveryRoot = {root}/recovery;
  Only_Numeric_Owners = true; }}
EXPORT {{ Export_Id = 1; Path = {root}/export; Pseudo = /ganesha; Access_Type = RW; Protocols = 4;
  Squash = No_Root_Squash; SecType = sys; Transports = TCP; FSAL {{ Name = VFS; }} }}
"""


@dataclass(frozen=True, kw_only=True)
class Server:
    """NFS-Ganesha on the host, which the guest reaches as its host."""

    pid: int
    port: int
    volumes: Path
    """The directory that is mounted for the provisioner."""

    def shown(self) -> list[str]:
        """What is in it beside what is the provisioner's own."""
        return sorted(path.name for path in self.volumes.iterdir() if path.name != PRIVATE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if os.geteuid() != 0 or shutil.which("ganesha.nfsd") is None:
        pytest.skip("NFS-Ganesha is needed, as root: apt-get install nfs-ganesha nfs-ganesha-vfs")
    root = tmp_path_factory.mktemp("ganesha")
    volumes = root / "export" / "volumes"
    volumes.mkdir(parents=True)
    (root / "recovery").mkdir()
    port = free_port()
    (root / "ganesha.conf").write_text(GANESHA.format(port=port, root=root))
    processes = ProcessGroup(root)
    files = ["-f", "ganesha.conf", "-p", "ganesha.pid", "-L", str(root / "server.log")]
    try:
        started = processes.start("ganesha", ["ganesha.nfsd", "-F", *files])
        yield Server(pid=started.pid, port=port, volumes=volumes)
    finally:
        processes.kill_all()


def mount_there(guest: Guest, source: str, point: str, *options: str) -> None:
    guest.run(["mkdir", "-p", point])
    mount = ["mount", "-t", "nfs4", "-o", ",".join(options), source, point]
    # A server that was started a moment ago refuses at first.
    wait_until(lambda: guest.execute(mount, timeout_s=120).returncode == 0, f"{source} is mounted")


@dataclass(kw_only=True)
class Running:
    """The provisioner in the guest, on the mounted directory."""

    guest: Guest
    server: Server
    efs: FaultyEfs
    kubeconfig: str
    file_system: str
    program: GuestProcess | None = field(default=None)

    def mount(self) -> None:
        # A hung server must not hang the test's own commands for long.
        options = ("nfsvers=4.1", "soft", "timeo=100", "retrans=1", f"port={self.server.port}")
        mount_there(self.guest, f"{self.guest.host}:{MOUNTED}", POINT, *options)

    def unmount(self) -> None:
        self.guest.run(["umount", "-l", POINT])

    def start(self) -> None:
        environment = {
            **self.efs.environment,
            "AWS_ENDPOINT_URL": self.efs.url.replace("127.0.0.1", self.guest.host),
            "FILE_SYSTEM_ID": self.file_system,
            "DNS_NAME": self.guest.host,
            "PROVISIONER_NAME": NAME,
        }
        flags = {
            "--kubeconfig": self.kubeconfig,
            "--call-timeout": "10s",
            "--retry-interval-max": "5s",
            "--leader-elect": "false",
        }
        argv = ["efs-provisioner", *(f"{key}={value}" for key, value in flags.items())]
        self.program = self.guest.popen(argv, env=environment)

    def kill(self) -> None:
        assert self.program is not None
        self.program.kill()
        self.program.wait()

    def stop(self) -> int:
        assert self.program is not None
        self.program.terminate()
        code = self.program.wait()
        print(self.program.output())
        return code


@pytest.fixture(scope="module")
def running(
    guest: Guest, server: Server, control_plane: ControlPlane, _efs_server: FaultyEfs
) -> Iterator[Running]:
    guest.install(*PACKAGES)
    _efs_server.reset()
    made = Running(
        guest=guest,
        server=server,
        efs=_efs_server,
        kubeconfig=guest.kubeconfig(control_plane.kubeconfig),
        file_system=_efs_server.make_file_system(),
    )
    made.mount()
    made.start()
    try:
        yield made
    finally:
        code = made.stop()
        guest.execute(["umount", "-f", "-l", POINT])
    assert code == 0


@pytest.fixture
def cluster(control_plane: ControlPlane, namespace: str, running: Running) -> Iterator[Sandbox]:
    api = Client(auth.load(kubeconfig=str(control_plane.kubeconfig)))
    made = Sandbox(api=api, namespace=namespace, provisioner=NAME, limit_s=LIMIT_S)
    running.efs.reset()
    yield made
    running.efs.clear_faults()
    made.delete_claims()
    made.wait(lambda: not made.volumes(), "all volumes are gone")
    made.clean_up()
    api.close()


def kind(cluster: Sandbox, mode: str, **parameters: str) -> StorageClass:
    given = {"provisioningMode": mode, **parameters}
    if mode == "efs-ap":
        given["basePath"] = MOUNTED
    return cluster.storage_class(f"-{mode}", parameters=given)


def event_says(cluster: Sandbox, about: str, *words: str) -> None:
    def said() -> bool:
        return any(all(word in event.message for word in words) for event in cluster.events(about))

    cluster.wait(said, f"an event about {about} says {' ... '.join(words)}")


def wait_gone(cluster: Sandbox, volume: PersistentVolume) -> None:
    cluster.wait(lambda: cluster.get_volume(volume.name) is None, "the volume is gone")


def as_user(script: str, *, uid: int, group: int) -> str:
    """A command for the guest, as a pod's process that is not root and has the volume's group."""
    code = f"import os; os.setgroups([{group}]); os.setgid({uid}); os.setuid({uid}); os.umask(2); "
    code += f"raise SystemExit(os.system({script!r}) >> 8)"
    return f"python3 -c {shlex.quote(code)}"


def test_what_a_pod_writes_to_a_directory_is_on_the_server_and_is_its_groups(
    cluster: Sandbox, running: Running
) -> None:
    cluster.claim("data", kind(cluster, "efs-dir"))
    (volume,) = cluster.wait_bound("data")
    guest, server, nfs = running.guest, running.server, volume.spec.nfs
    assert nfs is not None
    name = f"data-{volume.name}"
    assert (nfs.server, nfs.path) == (guest.host, f"{MOUNTED}/{name}")
    gid = int(volume.metadata.annotations[ANN_GID])
    # As a kubelet mounts it; only the port is not EFS's.
    options = (*volume.spec.mount_options, f"port={server.port}")
    mount_there(guest, f"{nfs.server}:{nfs.path}", "/mnt/volume", *options)
    try:
        assert "vers=4.1" in guest.run("grep ' /mnt/volume nfs4 ' /proc/mounts")
        script = "cd /mnt/volume && mkdir sub && echo written > sub/file && sync sub/file"
        guest.run(as_user(script, uid=1234, group=gid))
        refused = guest.execute(as_user("touch /mnt/volume/no", uid=1234, group=gid + 1))
        assert refused.returncode != 0
    finally:
        guest.run(["umount", "/mnt/volume"])
    directory = server.volumes / name
    assert (directory / "sub" / "file").read_text() == "written\n"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o2771
    found = (directory / "sub").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & stat.S_ISGID) == (1234, gid, stat.S_ISGID)
    cluster.delete_claims()
    wait_gone(cluster, volume)
    assert server.shown() == []
    trash = server.volumes / PRIVATE / "trash"
    wait_until(lambda: not list(trash.iterdir()), "the trash is empty", limit_s=LIMIT_S)
    assert running.efs.calls == []


def test_unmounted_under_the_running_provisioner_nothing_is_written_to_what_is_there_instead(
    cluster: Sandbox, running: Running
) -> None:
    guest, storage_class = running.guest, kind(cluster, "efs-dir")
    cluster.claim("before", storage_class)
    (before,) = cluster.wait_bound("before")
    running.unmount()
    cluster.claim("data", storage_class)
    cluster.delete_claims("before")
    event_says(cluster, "data", "not mounted")
    event_says(cluster, before.name, "not mounted")
    assert guest.run(["find", POINT, "-mindepth", "1"]) == ""
    # Something else in its place is not taken for it.
    guest.run(["mount", "-t", "tmpfs", "tmpfs", POINT])
    event_says(cluster, "data", "there is tmpfs")
    assert guest.run(["find", POINT, "-mindepth", "1"]) == ""
    running.unmount()
    guest.serve_nfs("/srv/other")
    other = guest.run("hostname -I").split()[0]
    mount_there(guest, f"{other}:/srv/other", POINT, "nfsvers=4.1")
    event_says(cluster, "data", f"{other}:/srv/other is mounted", f"want {guest.host}:{MOUNTED}")
    assert guest.run("ls -A /srv/other") == ""
    running.unmount()
    assert cluster.get_claim("data").spec.volume_name == ""
    assert running.server.shown() == [f"before-{before.name}"]
    running.mount()
    (volume,) = cluster.wait_bound("data")
    wait_gone(cluster, before)
    assert running.server.shown() == [f"data-{volume.name}"]


def test_while_the_server_hangs_access_points_are_made(cluster: Sandbox, running: Running) -> None:
    directories, points = kind(cluster, "efs-dir"), kind(cluster, "efs-ap")
    os.kill(running.server.pid, signal.SIGSTOP)
    try:
        cluster.claim("waits", directories)
        event_says(cluster, "waits", "not answered for")
        names = [f"goes-on-{number}" for number in range(3)]
        cluster.claims_at_once(names, points)
        cluster.wait_bound(*names)
        assert cluster.get_claim("waits").spec.volume_name == ""
    finally:
        os.kill(running.server.pid, signal.SIGCONT)
    cluster.wait_bound("waits")


def test_the_directory_of_an_access_point_goes_before_it(
    cluster: Sandbox, running: Running
) -> None:
    cluster.claim("data", kind(cluster, "efs-ap", onDelete="delete"))
    (volume,) = cluster.wait_bound("data")
    (point,) = running.efs.access_points()
    root = point["RootDirectory"]
    directory = running.server.volumes / Path(root["Path"]).relative_to(MOUNTED)
    # As EFS makes it when it is mounted for the first time.
    directory.mkdir(mode=int(root["CreationInfo"]["Permissions"], 8))
    (directory / "file").write_text("data")
    uid, gid = (root["CreationInfo"][key] for key in ("OwnerUid", "OwnerGid"))
    for path in (directory, directory / "file"):
        os.chown(path, uid, gid)
    running.efs.denied.add("DeleteAccessPoint")
    cluster.delete_claims()
    event_says(cluster, volume.name, "AWS denies elasticfilesystem:DeleteAccessPoint")
    # As long as it is there, it says whose directory that was.
    assert running.server.shown() == []
    assert running.efs.access_points() == [point]
    running.efs.clear_faults()
    wait_gone(cluster, volume)
    assert running.efs.access_points() == []


def test_killed_amid_claims_of_both_modes_each_has_one_volume(
    cluster: Sandbox, running: Running
) -> None:
    kinds: dict[str, Any] = {mode: kind(cluster, mode) for mode in ("efs-dir", "efs-ap")}
    names = {mode: [f"{mode}-{number}" for number in range(6)] for mode in kinds}
    for mode, storage_class in kinds.items():
        cluster.claims_at_once(names[mode], storage_class)
    some = lambda: running.server.shown() and running.efs.access_points()  # noqa: E731
    cluster.wait(some, "some of both are made")
    running.kill()
    running.start()
    volumes = {mode: cluster.wait_bound(*claims) for mode, claims in names.items()}
    directories = {
        f"{v.spec.claim_ref.name}-{v.name}" for v in volumes["efs-dir"] if v.spec.claim_ref
    }
    assert set(running.server.shown()) == directories
    points = running.efs.access_points()
    handles = {f"{running.file_system}::{point['AccessPointId']}" for point in points}
    assert {v.spec.csi.volume_handle for v in volumes["efs-ap"] if v.spec.csi} == handles
    assert (len(directories), len(handles)) == (6, 6)
    for mode, made in volumes.items():
        assert len({v.metadata.annotations[ANN_GID] for v in made}) == 6, mode
