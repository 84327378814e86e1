"""Volumes of nfs-subdir-external-provisioner: their end was decided by the class, at that time."""

from __future__ import annotations

from external_storage import Problems, StorageClass
from external_storage.kube.client import Client
from nfs_client_provisioner.parameters import NfsClientParameters, OnDelete

_KEYS = frozenset({"ondelete", "archiveondelete"})


def policy_of_class(client: Client, name: str) -> OnDelete | None:
    """What a class says about deletion; None if it is gone, or cannot be understood.

    Only the two parameters that say it are looked at: the class may have others of old.
    """
    storage_class = client.find(StorageClass, name) if name else None
    if storage_class is None:
        return None
    said = {k: v for k, v in storage_class.parameters.items() if k.lower() in _KEYS}
    try:
        return NfsClientParameters.from_class(said).policy
    except Problems:
        return None
