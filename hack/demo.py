"""The main job, step by step; started by hack/demo, which installs what it needs."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from external_storage.testing import ControlPlane

DEPLOY = Path(__file__).resolve().parent.parent / "nfs" / "deploy"
LIMIT_S = 60.0
CLAIM = "nfs-example"
TEXT = "a claim became a volume\n"


class DemoFailed(Exception):
    """A step did not end as it should; the message says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The running nfs-provisioner and how to reach it."""

    process: subprocess.Popen[bytes]
    log: Path
    export_root: Path
    nfs_port: int
    http_port: int

    def url(self, path: str) -> str:
        return f"nfs://127.0.0.1{path}?nfsport={self.nfs_port}&version=4"


@contextmanager
def step(what: str) -> Iterator[None]:
    """One line with its time."""
    print(f"  {what:<62}", end="", flush=True)
    started = time.monotonic()
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"{time.monotonic() - started:6.2f} s", flush=True)


def wait_for(what: str, met: Callable[[], bool], server: Server | None = None) -> None:
    """Poll until ``met``; DemoFailed after a minute or when nfs-provisioner has ended."""
    deadline = time.monotonic() + LIMIT_S
    while not met():
        if server is not None and server.process.poll() is not None:
            raise DemoFailed(f"nfs-provisioner ended with {server.process.returncode}")
        if time.monotonic() > deadline:
            raise DemoFailed(f"{what}: not within {LIMIT_S:.0f} s")
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_server(kubeconfig: Path, work: Path, root: Path) -> Server:
    """nfs-provisioner as a child, under the credentials of its own ServiceAccount."""
    nfs_port, http_port = free_port(), free_port()
    log = work / "nfs-provisioner.log"
    command = [
        *("setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "nfs_provisioner"),
        f"--kubeconfig={kubeconfig}",
        f"--export-root={root}",
        f"--run-dir={work / 'run'}",
        "--server-hostname=127.0.0.1",
        "--bind-address=127.0.0.1",
        f"--nfs-port={nfs_port}",
        f"--http-endpoint=127.0.0.1:{http_port}",
    ]
    with log.open("wb") as file:
        # In a session of its own: Ctrl-C is for the demo, which stops it in order.
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    return Server(
        process=process, log=log, export_root=root, nfs_port=nfs_port, http_port=http_port
    )


def ready(server: Server) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/readyz", timeout=2):
            return True
    except OSError:
        return False


def nfs(*command: str, text: str | None = None) -> str:
    """One of libnfs' tools: an NFS client without a kernel mount."""
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode != 0:
        raise DemoFailed(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def write_and_read(server: Server, export: str, work: Path) -> None:
    source = work / "hello.txt"
    source.write_text(TEXT)
    with step("writing hello.txt over NFS"):
        nfs("nfs-cp", str(source), server.url(f"{export}/hello.txt"))
    with step("reading it back"):
        if nfs("nfs-cat", server.url(f"{export}/hello.txt")) != TEXT:
            raise DemoFailed("what was read is not what was written")


def provision(plane: ControlPlane, server: Server) -> str:
    """Make the claim; the path its volume is exported under."""
    with step("creating the claim, until it is Bound"):
        plane.kubectl("apply", "-f", str(DEPLOY / "examples" / "claim.yaml"))
        wait_for(
            "the claim is Bound",
            lambda: plane.kubectl("get", "pvc", CLAIM, "-o", "jsonpath={.status.phase}") == "Bound",
            server,
        )
    print("\n" + plane.kubectl("get", "pvc,pv"))
    volumes = json.loads(plane.kubectl("get", "pv", "-o", "json"))["items"]
    path: str = volumes[0]["spec"]["nfs"]["path"]
    return path


def delete(plane: ControlPlane, server: Server, export: str) -> None:
    name = export.rsplit("/", 1)[1]
    with step("deleting the claim, until its volume is gone"):
        plane.kubectl("delete", "pvc", CLAIM)
        wait_for("the volume is gone", lambda: not plane.kubectl("get", "pv", "-o", "name"), server)
    with step("the directory is gone"):
        if (server.export_root / name).exists():
            raise DemoFailed(f"{server.export_root / name} is still there")
    with step("the export is gone"):
        try:
            nfs("nfs-ls", server.url(export))
        except DemoFailed:
            return
        raise DemoFailed(f"{export} is still served")


def keep(plane: ControlPlane, server: Server) -> None:
    print(
        f"""
It keeps running until Ctrl-C. To try next, in another terminal:

  export KUBECONFIG={plane.kubeconfig}
  alias kubectl={plane.program("kubectl")}
  kubectl apply -f {DEPLOY / "examples" / "claim.yaml"}
  kubectl get pvc,pv
  kubectl describe pvc {CLAIM}
  VOLUME=$(kubectl get pvc {CLAIM} -o jsonpath={{.spec.volumeName}})
  nfs-cp /etc/hostname "{server.url("/export/$VOLUME/hello")}"
  nfs-ls "{server.url("/export/$VOLUME")}"
  nfs-cat "{server.url("/export/$VOLUME/hello")}"
  curl -s 'http://127.0.0.1:{server.http_port}/healthz?verbose'
  less {server.log}
"""
    )
    with contextlib.suppress(KeyboardInterrupt):
        while server.process.poll() is None:
            time.sleep(0.5)
        raise DemoFailed(f"nfs-provisioner ended with {server.process.returncode}")


def stop(server: Server) -> None:
    with step("stopping nfs-provisioner and its NFS server"):
        server.process.terminate()
        code = server.process.wait(LIMIT_S)
        if code != 0:
            raise DemoFailed(f"nfs-provisioner ended with {code}")


def run(plane: ControlPlane, work: Path, root: Path, *, stay: bool) -> None:
    with step("applying the provisioner's RBAC and class"):
        for name in ("namespace.yaml", "rbac.yaml", "class.yaml"):
            plane.kubectl("apply", "-f", str(DEPLOY / name))
        kubeconfig = plane.service_account_kubeconfig("nfs-provisioner", "nfs-provisioner")
    server = start_server(kubeconfig, work, root)
    try:
        with step("starting nfs-provisioner under its ServiceAccount"):
            wait_for("nfs-provisioner is ready", lambda: ready(server), server)
        export = provision(plane, server)
        write_and_read(server, export, work)
        delete(plane, server, export)
        if stay:
            keep(plane, server)
        stop(server)
    except (DemoFailed, subprocess.TimeoutExpired):
        sys.stderr.write(server.log.read_text(errors="replace")[-4000:])
        raise
    finally:
        server.process.kill()
        server.process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="hack/demo")
    parser.add_argument("--keep", action="store_true", help="leave it running until Ctrl-C")
    parser.add_argument("--root", type=Path, help="directory for the volumes")
    arguments = parser.parse_args()
    # Also where the caller ignores SIGINT, as a script's background does.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="external-storage-demo-"))
    root: Path = (arguments.root or work / "export").resolve()
    root.mkdir(parents=True, exist_ok=True)
    plane = ControlPlane()
    try:
        with step("starting etcd, kube-apiserver, kube-controller-manager"):
            plane.start()
        run(plane, work, root, stay=arguments.keep)
        with step("stopping the control plane"):
            plane.stop()
    except (DemoFailed, subprocess.TimeoutExpired) as error:
        print(f"hack/demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        plane.stop()
        shutil.rmtree(work, ignore_errors=True)
    print(f"\nAll of it worked, in {time.monotonic() - started:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
