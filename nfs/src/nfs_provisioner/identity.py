"""Which instance owns an export root: a name made once and kept with the data."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

from external_storage import (
    CannotStart,
    Context,
    PersistentVolume,
    ProvisioningFailed,
    replace_file,
)
from external_storage.kube.errors import KubeError
from external_storage.kube.names import ANN_PROVISIONED_BY


def find_identity(path: Path, context: Context, server: Callable[[], str]) -> str:
    """The identity in the file ``path``, made if this is the first start on this root.

    ``server`` gives the address that our volumes are mounted from. Raises ``CannotStart``.
    """
    try:
        return str(uuid.UUID(path.read_text().strip()))
    except FileNotFoundError:
        _refuse_to_forget(path, context, server)
        identity = str(uuid.uuid4())
        replace_file(path, identity + "\n")
        return identity
    except ValueError:
        raise CannotStart(f"{path} is no UUID: restore it, volumes name it") from None


def _refuse_to_forget(path: Path, context: Context, server: Callable[[], str]) -> None:
    """A root without an identity, while there are volumes of this server: a disk is not mounted."""
    try:
        address = server()
        volumes = context.client.list_all(PersistentVolume)
    except (KubeError, ProvisioningFailed) as error:
        raise CannotStart(
            f"{path} does not exist, and whether this is the first start cannot be known: {error}"
        ) from error
    for volume in volumes:
        by_us = volume.metadata.annotations.get(ANN_PROVISIONED_BY) == context.name
        if by_us and volume.spec.nfs is not None and volume.spec.nfs.server == address:
            raise CannotStart(
                f"{path} does not exist, but volume {volume.name} has its data on this server: "
                "is the disk mounted? To go on without that data, put a new UUID into that file"
            )
