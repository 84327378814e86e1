"""A controller library for out-of-tree volume provisioners.

In reading order:

- A **provisioner** is a class with ``provision`` and ``delete`` (``provisioner.py`` is the whole
  contract). ``run`` makes a program of it.
- **Settings** are what an admin sets on the program; **Parameters** what a class says about its
  volumes. Both are dataclasses, checked before anything is touched.
- ``provision`` gets a **ProvisionRequest** and returns a **ProvisionedVolume**; the library builds
  the PersistentVolume, saves it and tells the user. What else can happen is said by raising one of
  the exceptions below.
- **AssetRecords** keep what was begun in the backend outside of it, for what a crash leaves behind.
- **Informer**, **Lister**, **WorkQueue**, **Workers**, **EventRecorder** and **Lease** are for work
  that no claim drives: what the library itself is made of.
- An **Agent** is a program that no claim drives, made of these and run like a provisioner.
- A **Manager** holds the parts of a running program together, for those who embed one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from external_storage.agent import Agent, AgentContext
    from external_storage.assets import (
        AssetRecord,
        AssetRecords,
        AssetState,
        DamagedRecord,
        Records,
    )
    from external_storage.deadline import Deadline
    from external_storage.durable import replace_file, sync_directory
    from external_storage.errors import (
        CannotStart,
        Ignored,
        Infeasible,
        ProvisionerError,
        ProvisioningFailed,
        ProvisioningInBackground,
        Reschedule,
        Unchanged,
        VolumeInUse,
    )
    from external_storage.events import EventRecorder
    from external_storage.fields import Problems, Seconds
    from external_storage.informer import Change, Informer, Lister
    from external_storage.kube.types import (
        PersistentVolume,
        PersistentVolumeClaim,
        Service,
        StorageClass,
    )
    from external_storage.leader import Lease
    from external_storage.logs import Logger, get_logger
    from external_storage.main import run
    from external_storage.manager import Manager
    from external_storage.owner import Owner, OwnerUnknown
    from external_storage.parameters import NoParameters, Parameters
    from external_storage.provisioner import (
        AvailableCapacity,
        Context,
        Expanded,
        ProvisionedVolume,
        Provisioner,
        ProvisionRequest,
    )
    from external_storage.settings import ProgramSettings, Settings
    from external_storage.workqueue import Backoff, Workers, WorkQueue

__all__ = [
    "Agent",
    "AgentContext",
    "AssetRecord",
    "AssetRecords",
    "AssetState",
    "AvailableCapacity",
    "Backoff",
    "CannotStart",
    "Change",
    "Context",
    "DamagedRecord",
    "Deadline",
    "EventRecorder",
    "Expanded",
    "Ignored",
    "Infeasible",
    "Informer",
    "Lease",
    "Lister",
    "Logger",
    "Manager",
    "NoParameters",
    "Owner",
    "OwnerUnknown",
    "Parameters",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "Problems",
    "ProgramSettings",
    "ProvisionRequest",
    "ProvisionedVolume",
    "Provisioner",
    "ProvisionerError",
    "ProvisioningFailed",
    "ProvisioningInBackground",
    "Records",
    "Reschedule",
    "Seconds",
    "Service",
    "Settings",
    "StorageClass",
    "Unchanged",
    "VolumeInUse",
    "WorkQueue",
    "Workers",
    "get_logger",
    "replace_file",
    "run",
    "sync_directory",
]

_HOMES = {
    "Agent": "agent",
    "AgentContext": "agent",
    "AssetRecord": "assets",
    "AssetRecords": "assets",
    "AssetState": "assets",
    "AvailableCapacity": "provisioner",
    "Backoff": "workqueue",
    "CannotStart": "errors",
    "Change": "informer",
    "Context": "provisioner",
    "DamagedRecord": "assets",
    "Deadline": "deadline",
    "EventRecorder": "events",
    "Expanded": "provisioner",
    "Ignored": "errors",
    "Infeasible": "errors",
    "Informer": "informer",
    "Lease": "leader",
    "Lister": "informer",
    "Logger": "logs",
    "Manager": "manager",
    "NoParameters": "parameters",
    "Owner": "owner",
    "OwnerUnknown": "owner",
    "Parameters": "parameters",
    "PersistentVolume": "kube.types",
    "PersistentVolumeClaim": "kube.types",
    "Problems": "fields",
    "ProgramSettings": "settings",
    "ProvisionRequest": "provisioner",
    "ProvisionedVolume": "provisioner",
    "Provisioner": "provisioner",
    "ProvisionerError": "errors",
    "ProvisioningFailed": "errors",
    "ProvisioningInBackground": "errors",
    "Records": "assets",
    "Reschedule": "errors",
    "Seconds": "fields",
    "Service": "kube.types",
    "Settings": "settings",
    "StorageClass": "kube.types",
    "Unchanged": "errors",
    "VolumeInUse": "errors",
    "WorkQueue": "workqueue",
    "Workers": "workqueue",
    "get_logger": "logs",
    "replace_file": "durable",
    "run": "main",
    "sync_directory": "durable",
}


def __getattr__(name: str) -> object:
    # On first use: a process of WorkerProcess imports this package for two of its modules and would
    # otherwise begin with the whole controller, an HTTP client and a command line.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
