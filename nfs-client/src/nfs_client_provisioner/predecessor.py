"""Volumes of nfs-subdir-external-provisioner: their end was decided by the class, at that time."""

from __future__ import annotations

from external_storage import StorageClass
from external_storage.kube.client import Client
from nfs_client_provisioner.parameters import OnDelete

# What Go's strconv.ParseBool reads as false.
_FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})


def policy_of_class(client: Client, name: str) -> OnDelete | None:
    """What a class says about deletion; None if it is gone.

    Read as nfs-subdir did, by the exact spelling: with ``onDelete: Delete``, or a key in another
    case, it archived, and what has been removed does not come back. What it did not understand, or
    would have failed at, is archived in any case.
    """
    storage_class = client.find(StorageClass, name) if name else None
    if storage_class is None:
        return None
    said = storage_class.parameters
    wanted = said.get("onDelete")
    if wanted in (OnDelete.DELETE, OnDelete.RETAIN):
        return OnDelete(wanted)
    is_removed = not wanted and said.get("archiveOnDelete") in _FALSE
    return OnDelete.DELETE if is_removed else OnDelete.ARCHIVE
