"""A storage host without a kernel: our own helper over models of rtslib and of LVM.

For what the helper decides, and for what becomes of it when the host refuses; that the kernel does
what it is told is seen in ``guest``.
"""

# ruff: noqa: N802 - the names are those of rtslib
from __future__ import annotations

import importlib
import json
import re
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.fake_lvm import GROUP, MIB, LvmModel

from external_storage import Deadline
from iscsi_targetd_provisioner.helper_session import Helper
from iscsi_targetd_provisioner.host import lio as lio_module
from iscsi_targetd_provisioner.host import lvm as lvm_module
from iscsi_targetd_provisioner.host import serve as serve_module
from iscsi_targetd_provisioner.lio_ssh import LioSsh
from iscsi_targetd_provisioner.names import Portal
from iscsi_targetd_provisioner.ssh import Login

OWNER = "example.com/iscsi"
IQN = "iqn.2026-01.com.example:storage"
THIN = f"{GROUP}/thin"
PORTAL = Portal("127.0.0.1")

__all__ = ["GROUP", "IQN", "MIB", "OWNER", "PORTAL", "THIN", "FakeHost", "fake_host"]


class RTSLibError(Exception):
    """As in rtslib."""


class Rtslib:
    """Of ``rtslib_fb`` what the helper uses, over dictionaries in the place of configfs."""

    def __init__(self, save_file: Path) -> None:
        self.RTSLibError = RTSLibError
        self.save_file = str(save_file)
        self.targets: dict[str, Any] = {}
        self.backstores: dict[str, Any] = {}
        self.calls: list[str] = []
        self.fail: str = ""
        """A call that the kernel refuses, such as ``NetworkPortal``."""
        self.logged_in: set[tuple[str, str]] = set()
        """Target and initiator."""

    def called(self, what: str) -> None:
        self.calls.append(what)
        if what == self.fail:
            raise RTSLibError(f"{what}: the kernel refuses")

    def RTSRoot(self) -> None:
        """Loads modules."""

    def FabricModule(self, _name: str) -> Any:
        return SimpleNamespace(targets=self.targets.values())

    def BlockStorageObject(self, name: str, dev: str = "", wwn: str | None = None) -> Any:
        if not dev:
            if name not in self.backstores:
                raise RTSLibError(f"No such storage object: {name}")
            return self.backstores[name]
        self.called("BlockStorageObject")
        made = SimpleNamespace(
            name=name, udev_path=dev, wwn=wwn or str(uuid.uuid4()), attached_luns=[], attributes={}
        )
        made.set_attribute = made.attributes.__setitem__

        def delete() -> None:
            # As the real one: the LUNs of everybody go with it.
            for lun in made.attached_luns:
                lun.parent_tpg.luns.remove(lun)
            del self.backstores[name]

        made.delete = delete
        made.dump = lambda: {
            "name": name,
            "plugin": "block",
            "dev": dev,
            "wwn": made.wwn,
            "attributes": dict(made.attributes),
        }
        self.backstores[name] = made
        return made

    def Target(self, _fabric: Any, iqn: str, mode: str = "any") -> Any:
        if iqn in self.targets:
            return self.targets[iqn]
        if mode == "lookup":
            raise RTSLibError(f"No such target: {iqn}")
        self.called("Target")
        made = SimpleNamespace(wwn=iqn, tpgs=[])

        def delete() -> None:
            for tpg in made.tpgs:
                for lun in tpg.luns:
                    lun.storage_object.attached_luns.remove(lun)
            del self.targets[iqn]

        made.delete = delete
        made.dump = lambda: {"wwn": iqn, "fabric": "iscsi", "tpgs": [t.dump() for t in made.tpgs]}
        self.targets[iqn] = made
        return made

    def TPG(self, target: Any, tag: int) -> Any:
        for tpg in target.tpgs:
            if tpg.tag == tag:
                return tpg
        self.called("TPG")
        made = SimpleNamespace(
            tag=tag,
            parent_target=target,
            luns=[],
            node_acls=[],
            network_portals=[],
            attributes={},
            enable=False,
        )
        made.set_attribute = made.attributes.__setitem__
        made.dump = lambda: {
            "tag": tag,
            "attributes": dict(made.attributes),
            "node_acls": [
                {"node_wwn": acl.node_wwn, "chap_password": acl.chap_password}
                for acl in made.node_acls
            ],
            "luns": [{"index": lun.lun, "name": lun.storage_object.name} for lun in made.luns],
        }
        target.tpgs.append(made)
        return made

    def LUN(self, tpg: Any, number: int, backstore: Any) -> Any:
        self.called("LUN")
        made = SimpleNamespace(lun=number, storage_object=backstore, parent_tpg=tpg)
        tpg.luns.append(made)
        backstore.attached_luns.append(made)
        return made

    def NodeACL(self, tpg: Any, wwn: str) -> Any:
        self.called("NodeACL")
        if not re.match(r"iqn\.[0-9]{4}-[0-1][0-9]\..*\..*", wwn):
            raise RTSLibError("WWN not valid as: iqn, naa, eui")
        made = Acl(self, tpg, wwn)
        tpg.node_acls.append(made)
        return made

    def MappedLUN(self, acl: Any, number: int, _lun: Any) -> None:
        self.called("MappedLUN")
        acl.mapped_luns.append(number)

    def NetworkPortal(self, tpg: Any, host: str, port: int) -> None:
        self.called("NetworkPortal")
        made = SimpleNamespace(ip_address=host, port=port)
        made.delete = lambda: tpg.network_portals.remove(made)
        tpg.network_portals.append(made)

    # -- what an admin does beside us

    def foreign_target(self, iqn: str, *backstores: str) -> Any:
        target = self.Target(None, iqn)
        tpg = self.TPG(target, 1)
        tpg.set_attribute("generate_node_acls", "1")
        for number, name in enumerate(backstores):
            self.LUN(tpg, number, self.backstores[name])
        return target

    def passwords(self, volume: str) -> set[str]:
        """What the volume's initiators have to show."""
        tpg = self.TPG(self.targets[f"{IQN}:{volume}"], 1)
        return {acl.chap_password for acl in tpg.node_acls}

    def initiators(self, iqn: str) -> set[str]:
        return {acl.node_wwn for acl in self.TPG(self.targets[iqn], 1).node_acls}


@dataclass(eq=False)
class Acl:
    """A NodeACL."""

    rtslib: Rtslib
    tpg: Any
    node_wwn: str
    mapped_luns: list[int] = field(default_factory=list)
    chap_userid: str = ""
    chap_password: str = ""
    chap_mutual_userid: str = ""
    chap_mutual_password: str = ""

    @property
    def session(self) -> bool:
        return (self.tpg.parent_target.wwn, self.node_wwn) in self.rtslib.logged_in

    def delete(self) -> None:
        self.tpg.node_acls.remove(self)


class PipeChannel:
    """Of a channel of paramiko what a session uses, over a socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def settimeout(self, seconds: float | None) -> None:
        self._end.settimeout(seconds)

    def sendall(self, data: bytes) -> None:
        self._end.sendall(data)

    def recv(self, size: int) -> bytes:
        return self._end.recv(size)

    def recv_stderr(self, _size: int) -> bytes:
        return b""

    def close(self) -> None:
        # Also who waits in recv is to see it.
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()


@dataclass
class FakeHost:
    """The helper, its models, and backends that talk to it."""

    rtslib: Rtslib
    lvm: LvmModel
    backends: list[LioSsh] = field(default_factory=list)

    def server(self, *pools: str) -> serve_module.Server:
        return serve_module.Server(lio_module.Lio(), pools)

    def open_channel(self, _deadline: Deadline, _command: str) -> Any:
        ours, theirs = socket.socketpair()

        def serve() -> None:
            with theirs, theirs.makefile("rb") as source:

                def tell(answer: dict[str, Any]) -> None:
                    theirs.sendall(json.dumps(answer).encode() + b"\n")

                with suppress(OSError):
                    tell({"hello": {"protocol": serve_module.PROTOCOL}})
                    serve_module.serve(source, tell, self.server())

        threading.Thread(target=serve, daemon=True).start()
        return PipeChannel(ours)

    def backend(self, **fields: Any) -> LioSsh:
        given = {"owner": OWNER, "iqn": IQN, "pools": {GROUP: 1.0, THIN: 1.0}, **fields}
        login = Login(host="storage", known_hosts=Path("/nowhere"))
        made = LioSsh("storage", login, listen=(PORTAL,), **given)
        made._helper = Helper(open_channel=self.open_channel, host="storage", installed=True)
        self.backends.append(made)
        return made


@contextmanager
def fake_host(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    rtslib = Rtslib(directory / "saveconfig.json")
    lvm = LvmModel(directory / "sys")
    for name, module in (
        ("rtslib_fb", rtslib),
        ("rtslib_fb.root", SimpleNamespace(default_save_file=rtslib.save_file)),
        ("rtslib_fb.tcm", SimpleNamespace(bs_cache={})),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    importlib.invalidate_caches()
    monkeypatch.setattr(lvm_module, "run", lvm.run)
    monkeypatch.setattr(lvm_module, "change", lvm.run)
    monkeypatch.setattr("iscsi_targetd_provisioner.host.diagnose.run", lvm.run)
    monkeypatch.setattr(lvm_module, "SYS", lvm.sys)
    monkeypatch.setattr("iscsi_targetd_provisioner.host.diagnose.TARGET_MODULE", directory)
    monkeypatch.setattr(serve_module, "OWN_LOCK", str(directory / "own.lock"))
    monkeypatch.setattr(serve_module, "TARGETCLI_LOCK", str(directory / "targetcli.lock"))
    made = FakeHost(rtslib, lvm)
    try:
        yield made
    finally:
        for backend in made.backends:
            backend.close()
