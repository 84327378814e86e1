"""Testing provisioners against a real control plane; public, for authors outside this repo too.

Install ``external-storage-lib[testing]``. A pytest plugin comes with it: its fixtures
``control_plane`` and ``namespace`` are there without an import (see ``plugin``).

An author subclasses ``Conformance`` and ``CrashSweep`` and says how their program is run. For tests
of one's own there are ``FaultProxy``, ``Sandbox`` (claims, classes and volumes of one namespace),
``ProgramProcess`` and the ``builders``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from external_storage.testing.access import ControlPlaneError
    from external_storage.testing.cluster import Cluster, ClusterError
    from external_storage.testing.conformance import Conformance
    from external_storage.testing.controlplane import ControlPlane
    from external_storage.testing.crashes import CrashSweep
    from external_storage.testing.faultproxy import FaultProxy
    from external_storage.testing.guest import (
        CommandFailed,
        Disk,
        Guest,
        GuestError,
        GuestProcess,
        Tap,
    )
    from external_storage.testing.program import Program, ProgramProcess
    from external_storage.testing.sandbox import Sandbox
    from external_storage.testing.undertest import Bench, UnderTest

__all__ = [
    "Bench",
    "Cluster",
    "ClusterError",
    "CommandFailed",
    "Conformance",
    "ControlPlane",
    "ControlPlaneError",
    "CrashSweep",
    "Disk",
    "FaultProxy",
    "Guest",
    "GuestError",
    "GuestProcess",
    "Program",
    "ProgramProcess",
    "Sandbox",
    "Tap",
    "UnderTest",
]

_HOMES = {
    "Bench": "undertest",
    "Cluster": "cluster",
    "ClusterError": "cluster",
    "CommandFailed": "guest",
    "Conformance": "conformance",
    "ControlPlane": "controlplane",
    "ControlPlaneError": "access",
    "CrashSweep": "crashes",
    "Disk": "guest",
    "FaultProxy": "faultproxy",
    "Guest": "guest",
    "GuestError": "guest",
    "GuestProcess": "guest",
    "Program": "program",
    "ProgramProcess": "program",
    "Sandbox": "sandbox",
    "Tap": "guest",
    "UnderTest": "undertest",
}


def __getattr__(name: str) -> object:
    # On first use: pytest loads the plugin, and so this package, in every run of the environment,
    # and should not import cryptography for it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    found: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found
