"""Testing provisioners against a real control plane; public, for authors outside this repo too.

Install ``external-storage-lib[testing]``. A pytest plugin comes with it: its fixtures
``control_plane`` and ``namespace`` are there without an import (see ``plugin``).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from external_storage.testing.access import ControlPlaneError
    from external_storage.testing.controlplane import ControlPlane
    from external_storage.testing.faultproxy import FaultProxy

__all__ = ["ControlPlane", "ControlPlaneError", "FaultProxy"]

_HOMES = {
    "ControlPlane": "controlplane",
    "ControlPlaneError": "access",
    "FaultProxy": "faultproxy",
}


def __getattr__(name: str) -> object:
    # On first use: pytest loads the plugin, and so this package, in every run of the environment,
    # and should not import cryptography for it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    found: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found
