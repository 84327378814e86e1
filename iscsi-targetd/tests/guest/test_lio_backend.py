"""The lio-ssh backend on real LVM and LIO: what all promise, and what this one adds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.backend_suite import BackendSuite, Bench
from tests.storage_host import GROUP, PORTAL, THIN, StorageHost

from iscsi_targetd_provisioner.lio_ssh import LioSsh

# An emulated guest is some ten times slower than its host, and the host may be busy.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def backend(storage_host: StorageHost) -> Iterator[LioSsh]:
    made = storage_host.backend()
    yield made
    made.close()


@pytest.fixture
def host(storage_host: StorageHost) -> Iterator[StorageHost]:
    """As it was, after the test too."""
    yield storage_host
    storage_host.clear()


@pytest.fixture
def bench(backend: LioSsh, host: StorageHost) -> Bench:
    return Bench(backend, GROUP, portals=(PORTAL,), passwords=host.passwords)


class TestThick(BackendSuite):
    """On a volume group."""


class TestThin(BackendSuite):
    """On a thin pool."""

    @pytest.fixture
    def bench(self, backend: LioSsh, host: StorageHost) -> Bench:
        return Bench(backend, THIN, portals=(PORTAL,), passwords=host.passwords)
