"""Measures iscsi-targetd-provisioner with its lio-ssh backend, on a storage host in a guest.

    hack/bench/run iscsi-targetd [--json] [--claims N]

``claim_ratio``: from a claim to the PersistentVolume of its exported volume, beside lvcreate and
the same calls of rtslib, made by one process that does nothing else, in the same guest; smaller is
better. ``targetcli_speedup``: the export alone, beside one targetcli that is fed the same by a
script; larger is better. ``parallel_ratio``: that many claims at once, beside the same number one
after the other; smaller is better.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final

from external_storage import Deadline, StorageClass
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.testing import ControlPlane, Program, ProgramProcess, Sandbox
from external_storage.testing.guest import Guest
from external_storage.testing.guest.storage import KEY, KNOWN_HOSTS, let_in, make_volume_group
from iscsi_targetd_provisioner.backend import Access
from iscsi_targetd_provisioner.lio_ssh import LioSsh
from iscsi_targetd_provisioner.names import Portal
from iscsi_targetd_provisioner.ssh import Login

MIB: Final = 1 << 20
SIZE: Final = 8 * MIB
REQUEST: Final = {"resources": {"requests": {"storage": str(SIZE)}}}
GROUP: Final = "vg-bench"
IQN: Final = "iqn.2026-01.com.example:bench"
INITIATOR: Final = "iqn.2026-01.com.example:node"
LIMIT_S: Final = 600.0
# What is compared takes turns, so that a busier minute of the machine is nobody's alone.
ROUNDS: Final = 3
POLL_S: Final = 0.005

# The calls that an export takes, and nothing beside them. Prints the seconds of each volume.
BARE: Final = """
import json, subprocess, sys, time
import rtslib_fb as rtslib
group, size, base, initiator, *names = sys.argv[1:]
root, fabric = rtslib.RTSRoot(), rtslib.FabricModule("iscsi")
for name in names:
    began = time.monotonic()
    argv = ["lvcreate", "-qqy", "-Wy", "-L", size + "B", "-n", name, group]
    subprocess.run(argv, check=True, capture_output=True)
    backstore = rtslib.BlockStorageObject(name, dev="/dev/%s/%s" % (group, name))
    tpg = rtslib.TPG(rtslib.Target(fabric, "%s:%s" % (base, name)), 1)
    for attribute in ("generate_node_acls", "cache_dynamic_acls", "authentication"):
        tpg.set_attribute(attribute, "0")
    lun = rtslib.LUN(tpg, 0, backstore)
    rtslib.MappedLUN(rtslib.NodeACL(tpg, initiator), 0, lun)
    rtslib.NetworkPortal(tpg, "127.0.0.1", 3260)
    tpg.enable = True
    root.save_to_file()
    print(time.monotonic() - began)
"""


class StorageHost:
    """The guest, with a volume group."""

    def __init__(self, guest: Guest, directory: Path) -> None:
        self.guest = guest
        self.directory = directory
        make_volume_group(guest, GROUP, size=1024 * MIB)
        # As after an installation: the first call of it makes its directories.
        guest.run(["targetcli", "set global auto_add_default_portal=false"], timeout_s=120)
        self.port = guest.forward(22)
        let_in(guest, directory, host="127.0.0.1", port=self.port)

    def login(self) -> Login:
        known, key = self.directory / KNOWN_HOSTS, self.directory / KEY
        return Login(host="127.0.0.1", port=self.port, known_hosts=known, key_file=key)

    def config(self) -> str:
        ssh = {
            "host": "127.0.0.1",
            "port": self.port,
            "knownHosts": str(self.directory / KNOWN_HOSTS),
            "keyFile": str(self.directory / KEY),
        }
        server = {"type": "lio-ssh", "ssh": ssh, "iqn": IQN, "portals": ["127.0.0.1"]}
        return json.dumps({"servers": {"storage": {**server, "pools": [GROUP]}}})

    def bare(self, *names: str) -> list[float]:
        """Make these volumes without us; the seconds of each."""
        argv = ["python3", "-c", BARE, GROUP, str(SIZE), IQN, INITIATOR, *names]
        return [float(line) for line in self.guest.run(argv, timeout_s=LIMIT_S).split()]

    def lvcreate(self, *names: str) -> None:
        for name in names:
            self.guest.run(["lvcreate", "-qqy", "-Wy", "-L", f"{SIZE}B", "-n", name, GROUP])

    def clear(self, *names: str) -> None:
        self.guest.run(["targetcli", "clearconfig", "confirm=true"], timeout_s=120)
        for name in names:
            self.guest.run(["lvremove", "-qqy", f"{GROUP}/{name}"])


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def fresh(kind: str, count: int) -> list[str]:
    return [f"{kind}-{uuid.uuid4().hex[:8]}" for _ in range(count)]


def by_targetcli(host: StorageHost, names: list[str]) -> float:
    """Seconds an export, of one targetcli for all of them."""
    commands = []
    for name in names:
        iqn = f"{IQN}:{name}"
        commands += [
            f"/backstores/block create {name} /dev/{GROUP}/{name}",
            f"/iscsi create {iqn}",
            f"/iscsi/{iqn}/tpg1 set attribute generate_node_acls=0 cache_dynamic_acls=0",
            f"/iscsi/{iqn}/tpg1/luns create /backstores/block/{name} lun0",
            f"/iscsi/{iqn}/tpg1/acls create {INITIATOR}",
            f"/iscsi/{iqn}/tpg1/portals create 127.0.0.1 3260",
            "/ saveconfig",
        ]
    script = "\n".join([*commands, "exit"]) + "\n"
    seconds = timed(lambda: host.guest.run(["targetcli"], input=script, timeout_s=LIMIT_S))
    portals = host.guest.run("ls -d /sys/kernel/config/target/iscsi/iqn.*/tpgt_1/np/127.0.0.1:3260")
    missing = [name for name in names if f"{IQN}:{name}/" not in portals]
    if missing:
        sys.exit(f"targetcli has not exported {', '.join(missing)}: what it took says nothing")
    return seconds / len(names)


def by_backend(host: StorageHost, names: list[str]) -> float:
    """Seconds an export of ours."""
    portal = Portal("127.0.0.1")
    backend = LioSsh("bench", host.login(), owner="bench", iqn=IQN, pools={GROUP: 1.0})
    access = Access(initiators={INITIATOR}, portals=(portal,))
    deadline = Deadline(time.monotonic() + LIMIT_S)
    try:
        for name in names:
            backend.create(GROUP, name, SIZE, deadline=deadline)
        seconds = timed(
            lambda: [backend.export(GROUP, name, access, deadline=deadline) for name in names]
        )
    finally:
        backend.close()
    return seconds / len(names)


def exports(host: StorageHost, count: int) -> dict[str, float]:
    ours, theirs = [], []
    for _ in range(ROUNDS):
        names = fresh("ours", count)
        ours.append(by_backend(host, names))
        host.clear(*names)
        names = fresh("theirs", count)
        host.lvcreate(*names)
        theirs.append(by_targetcli(host, names))
        host.clear(*names)
    mine, other = statistics.median(ours), statistics.median(theirs)
    return {
        "export_s": round(mine, 3),
        "targetcli_export_s": round(other, 3),
        "targetcli_speedup": round(other / mine, 2),
    }


def claims(host: StorageHost, box: Sandbox, count: int) -> dict[str, float]:
    # ext4: xfs needs volumes of 300 MiB.
    storage_class = box.storage_class(parameters={"initiators": INITIATOR, "fsType": "ext4"})
    single, bare, in_turn, at_once = [], [], [], []
    for _ in range(ROUNDS):
        took = [one(box, name, storage_class) for name in fresh("claim", count)]
        single += took
        in_turn.append(sum(took))
        box.delete_claims()
        box.wait(lambda: not box.volumes(), "all volumes are gone")
        names = fresh("bare", count)
        bare += host.bare(*names)
        host.clear(*names)
        at_once.append(together(box, fresh("claim", count), storage_class))
        box.delete_claims()
        box.wait(lambda: not box.volumes(), "all volumes are gone")
    return {
        "claim_s": round(statistics.median(single), 3),
        "bare_s": round(statistics.median(bare), 3),
        "claim_ratio": round(statistics.median(single) / statistics.median(bare), 2),
        "parallel_ratio": round(statistics.median(at_once) / statistics.median(in_turn), 2),
    }


def one(box: Sandbox, name: str, storage_class: StorageClass) -> float:
    """Seconds from a claim to its volume; to its binding it is another's work."""
    began = time.monotonic()
    claim = box.claim(name, storage_class, **REQUEST)
    while box.get_volume(f"pvc-{claim.uid}") is None:
        time.sleep(POLL_S)
    seconds = time.monotonic() - began
    box.wait_bound(name)
    return seconds


def together(box: Sandbox, names: list[str], storage_class: StorageClass) -> float:
    began = time.monotonic()
    box.claims_at_once(names, storage_class, **REQUEST)
    box.wait_bound(*names)
    return time.monotonic() - began


def with_program(host: StorageHost, directory: Path, count: int) -> dict[str, float]:
    command = (sys.executable, "-m", "iscsi_targetd_provisioner")
    servers = directory / "servers.yaml"
    servers.write_text(host.config())
    with ControlPlane() as plane:
        api = Client(auth.load(kubeconfig=str(plane.kubeconfig)))
        program = ProgramProcess(
            Program(argv=(*command, f"--servers-file={servers}")),
            name="bench/iscsi",
            kubeconfig=plane.kubeconfig,
            log=directory / "log",
        )
        box = Sandbox(api=api, namespace="default", provisioner=program.name, limit_s=LIMIT_S)
        program.start()
        try:
            return claims(host, box, count)
        finally:
            program.kill()
            api.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="hack/bench/run iscsi-targetd", description=__doc__)
    parser.add_argument("--claims", type=int, default=8, help="of each round")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as text, Guest(name="bench") as guest:
        host = StorageHost(guest, Path(text))
        result = exports(host, given.claims) | with_program(host, Path(text), given.claims)
    if given.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:26} {value}")


if __name__ == "__main__":
    main()
