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
    """On a thin pool; what LIO does is the same on both, and has been seen above."""

    test_exports_are_exactly_those_asked_for = None  # type: ignore[assignment]
    test_exporting_again_changes_nothing = None  # type: ignore[assignment]
    test_volumes_do_not_share_what_nodes_tell_them_apart_by = None  # type: ignore[assignment]
    test_exporting_what_is_not_there_fails_and_leaves_nothing = None  # type: ignore[assignment]
    test_credentials_can_be_replaced_and_taken_away = None  # type: ignore[assignment]
    test_credentials_do_not_show_in_what_is_printed_of_an_access = None  # type: ignore[assignment]

    @pytest.fixture
    def bench(self, backend: LioSsh, host: StorageHost) -> Bench:
        return Bench(backend, THIN, portals=(PORTAL,), passwords=host.passwords)
