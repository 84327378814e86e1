"""What the tests share: a targetd over a model, and the cluster."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# So that they find their helpers, as ``tests.targetd_server``.
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fake_host import FakeHost, fake_host
from tests.on_targetd import provisioner_on
from tests.sshd import Sshd, sshd_in
from tests.storage_host import StorageHost
from tests.storage_host import storage_host as storage_host_of
from tests.targetd_server import MIB, Model, TargetdServer

from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.testing import ControlPlane
from iscsi_targetd_provisioner.provisioner import IscsiTargetdProvisioner


@pytest.fixture
def targetd() -> Iterator[TargetdServer]:
    """One group with thick volumes, another with a thin pool."""
    model = Model(pools={"vg-targetd": 256 * MIB, "fast/thin": 64 * MIB})
    with TargetdServer(model) as server:
        yield server


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    """Our helper, over models of LVM and LIO."""
    with fake_host(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def provisioner(targetd: TargetdServer) -> Iterator[IscsiTargetdProvisioner]:
    """Ours, with the targetd as its only server."""
    with provisioner_on(targetd) as made:
        yield made


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A real one on loopback."""
    with sshd_in(tmp_path_factory.mktemp("sshd")) as made:
        yield made


@pytest.fixture
def client(control_plane: ControlPlane) -> Iterator[Client]:
    """With all rights."""
    made = Client(auth.load(kubeconfig=str(control_plane.kubeconfig)))
    yield made
    made.close()


@pytest.fixture(scope="session")
def storage_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageHost]:
    """A guest, shared by all tests that need real LIO: leave nothing in it."""
    with storage_host_of(tmp_path_factory.mktemp("storage-host")) as host:
        yield host
