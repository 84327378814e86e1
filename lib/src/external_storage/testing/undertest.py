"""What the conformance suite and the crash sweep have to know of a provisioner, and its bench."""

from __future__ import annotations

import contextlib
import sys
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from external_storage.claims import is_terminating
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.names import ACCESS_MODES
from external_storage.kube.types import StorageClass
from external_storage.testing.controlplane import ControlPlane
from external_storage.testing.faultproxy import FaultProxy
from external_storage.testing.program import Program, ProgramProcess
from external_storage.testing.sandbox import Sandbox

_CLEAN_UP_S = 20.0
_MOST_LOG_BYTES = 50_000


@dataclass(kw_only=True)
class Bench(Sandbox):
    """One test's view of the provisioner: its program, its back end, and a namespace of claims."""

    plane: ControlPlane
    program: ProgramProcess
    proxy: FaultProxy
    """Between the program and the API server."""
    assets: Callable[[], set[str]]
    traces: Callable[[], set[str]]
    parameters: Mapping[str, str] = field(default_factory=dict)

    def good_class(self, suffix: str = "", **fields: Any) -> StorageClass:  # noqa: ANN401
        """A class with the parameters that the author's tests are to use."""
        return self.storage_class(suffix, **{"parameters": dict(self.parameters), **fields})

    def left(self) -> dict[str, list[str]]:
        """Everything there is of our volumes, by place; empty when there is nothing."""
        places = {
            "volumes": {volume.name for volume in self.volumes()},
            "assets": self.assets(),
            "traces": self.traces(),
            # One that a finalizer keeps: something may still be made for it.
            "claims": {claim.name for claim in self.claims() if is_terminating(claim)},
        }
        return {place: sorted(names) for place, names in places.items() if names}

    def restart(self) -> None:
        """Start the program again, killing it if it runs; without faults."""
        self.proxy.clear()
        if self.program.running:
            self.program.kill()
        self.program.start()

    def describe(self) -> str:
        """Also what is in the back end."""
        return f"{Sandbox.describe(self)}\nin the back end: {sorted(self.assets())}"


class UnderTest:
    """Base of the suites; an author says in a subclass how to run their provisioner.

    The program is started once for all tests of a class, on a fresh directory, and again where a
    test has ended it. It runs under a provisioner name of its own, and without leader election.
    """

    manifests: ClassVar[Sequence[Path]] = ()
    """Files for ``kubectl apply``, with one ServiceAccount, under which the program then runs: so
    the rights in them are tested too. Without them it runs as an admin."""
    class_parameters: ClassVar[Mapping[str, str]] = {}
    """Parameters of the classes that the tests make."""
    access_modes: ClassVar[Collection[str]] = tuple(sorted(ACCESS_MODES))
    """What the provisioner declares as its ``access_modes``."""
    supports_block: ClassVar[bool] = False
    """What the provisioner declares as ``supports_block``."""
    bad_parameters: ClassVar[Mapping[str, str]] = {}
    """Parameters with values that must be refused; each is tried alone."""

    def program(self, directory: Path) -> Program:
        """How to start the program on a directory that is this class's own, empty at first."""
        raise NotImplementedError

    def assets(self, directory: Path) -> Collection[str]:
        """The names of all assets in the back end now, half-made ones too; none at first."""
        raise NotImplementedError

    def traces(self, directory: Path) -> Collection[str]:
        """Names of all else that is kept about volumes: records, files, exports; none at first."""
        return ()

    @pytest.fixture
    def bench(
        self,
        request: pytest.FixtureRequest,
        control_plane: ControlPlane,
        namespace: str,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> Iterator[Bench]:
        """The running program and an empty back end."""
        stash, key = _stash(request), _rooms
        room = stash.get(key, None)
        if room is None or room.spoiled():
            if room is not None:
                room.close()
            directory = tmp_path_factory.mktemp("backend")
            room = stash[key] = Room(self, control_plane, directory)
        with room.bench(namespace) as bench:
            yield bench


_rooms = pytest.StashKey["Room | None"]()


def _stash(request: pytest.FixtureRequest) -> pytest.Stash:
    """That of the test's class, with what is in it closed at the end of the class.

    Not a fixture of scope ``class``: as methods pytest will have none in the future.
    """
    node = request.node.getparent(pytest.Class)
    if _rooms not in node.stash:
        node.stash[_rooms] = None

        def close() -> None:
            room = node.stash[_rooms]
            if room is not None:
                room.close()

        node.addfinalizer(close)
    stash: pytest.Stash = node.stash
    return stash


class Room:
    """What the tests of one class share until one leaves something behind: a directory, a proxy, a
    provisioner name and its program. Close it."""

    def __init__(self, author: UnderTest, plane: ControlPlane, directory: Path) -> None:
        self._author = author
        self._plane = plane
        self._directory = directory / "root"
        self._directory.mkdir()
        self._stack = contextlib.ExitStack()
        self._proxy = self._stack.enter_context(FaultProxy(plane))
        self._api = Client(auth.load(kubeconfig=str(plane.kubeconfig)))
        self._stack.callback(self._api.close)
        self._program = ProgramProcess(
            author.program(self._directory),
            name=f"example.com/conformance-{uuid.uuid4().hex[:8]}",
            kubeconfig=self._proxy.kubeconfig(for_=_account(plane, author.manifests)),
            log=directory / "program.log",
        )
        self._stack.callback(self._end_program)

    def spoiled(self) -> bool:
        """Whether the last test has left something behind that would disturb the next one."""
        return bool(self._assets() | self._traces())

    def close(self) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def bench(self, namespace: str) -> Iterator[Bench]:
        made = Bench(
            plane=self._plane,
            api=self._api,
            namespace=namespace,
            provisioner=self._program.name,
            program=self._program,
            proxy=self._proxy,
            assets=self._assets,
            traces=self._traces,
            parameters=self._author.class_parameters,
        )
        start = _size(self._program.log)
        try:
            if not self._program.running:
                self._program.start()
            yield made
        finally:
            self._clear(made)
            sys.stderr.write(_read_from(self._program.log, start))

    def _clear(self, bench: Bench) -> None:
        """Leave nothing behind, as far as the program still can; no test of anything."""
        with contextlib.suppress(Exception, pytest.fail.Exception):
            bench.proxy.clear()
            bench.delete_claims()
            if bench.program.running and bench.left():
                bench.limit_s = _CLEAN_UP_S
                bench.wait(lambda: not bench.left(), "nothing is left")
        bench.clean_up()

    def _end_program(self) -> None:
        if self._program.running:
            self._program.kill()

    def _assets(self) -> set[str]:
        return set(self._author.assets(self._directory))

    def _traces(self) -> set[str]:
        return set(self._author.traces(self._directory))


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def _read_from(log: Path, start: int) -> str:
    """What has been logged since, if it is much only its end: pytest shows it with a failure."""
    with log.open("rb") as file:
        file.seek(max(start, _size(log) - _MOST_LOG_BYTES))
        return file.read().decode(errors="replace")


def _account(plane: ControlPlane, manifests: Sequence[Path]) -> Path | None:
    """A kubeconfig of the ServiceAccount in the manifests, which are applied; None without."""
    if not manifests:
        return None
    accounts = []
    for manifest in manifests:
        plane.kubectl("apply", "-f", str(manifest))
        for made in yaml.safe_load_all(manifest.read_text(encoding="utf-8")):
            if made is not None and made["kind"] == "ServiceAccount":
                accounts.append(made["metadata"])
    if len(accounts) != 1:
        raise ValueError(f"the manifests have {len(accounts)} ServiceAccounts: want one")
    meta = accounts[0]
    return plane.service_account_kubeconfig(meta.get("namespace", "default"), meta["name"])
