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

from external_storage.agent import Agent, AgentContext
from external_storage.assets import AssetRecord, AssetRecords, AssetState, DamagedRecord, Records
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
