"""One guest for all tests here, with an agent in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

# So that they find their helpers, as ``tests.guest.guest_node``.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.guest.guest_node import PACKAGES, GuestNode

from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.testing import ControlPlane, Guest


@pytest.fixture(scope="module")
def machine(control_plane: ControlPlane) -> Iterator[GuestNode]:
    """A guest of these tests alone: it is rebooted."""
    with Guest(name="local-volume") as guest, ExitStack() as undo:
        guest.install(*PACKAGES)
        api = Client(auth.load(kubeconfig=str(control_plane.kubeconfig)))
        undo.callback(api.close)
        made = GuestNode(guest, api, control_plane.kubeconfig)
        made.set_up()
        undo.callback(made.tear_down)
        made.start_agent()
        yield made


@pytest.fixture
def node(machine: GuestNode, namespace: str, tmp_path: Path) -> Iterator[GuestNode]:
    """For one test: what it has plugged in and linked is gone after it."""
    machine.namespace, machine.directory = namespace, tmp_path
    with ExitStack() as undo:
        machine.undo = undo
        yield machine
