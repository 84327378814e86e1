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
- A **Manager** holds the parts of a running program together, for those who embed one.
"""

from external_storage.assets import AssetRecord, AssetRecords, AssetState, DamagedRecord
from external_storage.durable import replace_file, sync_directory
from external_storage.fields import Problems, Seconds
from external_storage.kube.types import (
    PersistentVolume,
    PersistentVolumeClaim,
    Service,
    StorageClass,
)
from external_storage.logs import Logger, get_logger
from external_storage.main import run
from external_storage.manager import Manager
from external_storage.parameters import NoParameters, Parameters
from external_storage.provisioner import (
    CannotStart,
    Context,
    Deadline,
    Ignored,
    Infeasible,
    ProvisionedVolume,
    Provisioner,
    ProvisionerError,
    ProvisioningFailed,
    ProvisioningInBackground,
    ProvisionRequest,
    Reschedule,
    Unchanged,
    VolumeInUse,
)
from external_storage.settings import Settings

__all__ = [
    "AssetRecord",
    "AssetRecords",
    "AssetState",
    "CannotStart",
    "Context",
    "DamagedRecord",
    "Deadline",
    "Ignored",
    "Infeasible",
    "Logger",
    "Manager",
    "NoParameters",
    "Parameters",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "Problems",
    "ProvisionRequest",
    "ProvisionedVolume",
    "Provisioner",
    "ProvisionerError",
    "ProvisioningFailed",
    "ProvisioningInBackground",
    "Reschedule",
    "Seconds",
    "Service",
    "Settings",
    "StorageClass",
    "Unchanged",
    "VolumeInUse",
    "get_logger",
    "replace_file",
    "run",
    "sync_directory",
]
