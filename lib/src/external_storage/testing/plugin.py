"""The pytest plugin: a control plane or a cluster for the session, a namespace for each test.

pytest finds it by itself where ``external-storage-lib`` is installed. Loading it imports nothing
but pytest, since every pytest run of the environment does.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from external_storage.testing.cluster import Cluster
    from external_storage.testing.controlplane import ControlPlane
    from external_storage.testing.guest import Guest

# Their tests are collected through a subclass elsewhere: pytest would not find the asserts.
pytest.register_assert_rewrite(
    "external_storage.testing.conformance", "external_storage.testing.crashes"
)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Build the control plane's programs before the first test, if one needs them.

    In the fixture it would count as that test's time, run into its time limit, and be silent.
    """
    used = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if used & {"cluster", "control_plane"} and not session.config.option.collectonly:
        from external_storage.testing.binaries import CONTROL_PLANE, NODE, BinariesError, ensure

        # The fixture fails with it again, and the tests which need no control plane still run.
        with contextlib.suppress(BinariesError):
            ensure((CONTROL_PLANE, NODE) if "cluster" in used else (CONTROL_PLANE,))
    if "guest" in used and not session.config.option.collectonly:
        from external_storage.testing.guest import GuestError, Hardware, ensure_snapshot

        with contextlib.suppress(GuestError):
            ensure_snapshot(Hardware())


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """A control plane with an audit log, shared by all tests: keep to your own namespace."""
    from external_storage.testing.controlplane import ControlPlane

    with ControlPlane(audit=True) as running:
        yield running


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster that runs pods, shared by all tests: keep to a namespace of your own.

    Who kills or restarts parts of it leaves them running and ready.
    """
    from external_storage.testing.cluster import Cluster

    with Cluster() as running:
        yield running


@pytest.fixture(scope="session")
def guest() -> Iterator[Guest]:
    """A virtual machine with a storage kernel, shared by all tests: keep to your own disks.

    Who reboots one, or cuts its power, starts a ``Guest`` for that.
    """
    from external_storage.testing.guest import Guest

    with Guest() as running:
        yield running


@pytest.fixture
def namespace(control_plane: ControlPlane, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a fresh namespace; it begins with the test's name, and is deleted after it.

    The deletion is not waited for. Objects outside namespaces (volumes, classes) are the test's
    own to delete; name them after the namespace to keep them apart.
    """
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")
    name = f"{words[:40].strip('-')}-{uuid.uuid4().hex[:8]}"
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    control_plane.request("POST", "/api/v1/namespaces", body)
    yield name
    control_plane.request("DELETE", f"/api/v1/namespaces/{name}")
