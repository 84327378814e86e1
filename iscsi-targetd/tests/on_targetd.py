"""The provisioner on a targetd over its model, called as the library calls it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import msgspec
from tests.targetd_server import MIB, PASSWORD, TargetdServer

from external_storage import (
    Context,
    Deadline,
    PersistentVolume,
    ProvisionedVolume,
    ProvisionerError,
    ProvisionRequest,
)
from external_storage.kube.client import Client
from external_storage.metrics import Metrics
from external_storage.testing import builders
from iscsi_targetd_provisioner.provisioner import IscsiTargetdProvisioner
from iscsi_targetd_provisioner.settings import IscsiTargetdParameters, IscsiTargetdSettings

TRIES = 10
LOST_S = 0.5
"""How long an answer that never comes is waited for."""


class NoEvents:
    def normal(self, *_args: object) -> None:
        pass

    warning = normal


class NoVolumes:
    """The API server as far as a call asks it: nothing has been saved."""

    def find(self, *_args: object, **_kwargs: object) -> None:
        return None


@contextlib.contextmanager
def provisioner_on(targetd: TargetdServer) -> Iterator[IscsiTargetdProvisioner]:
    texts = {
        "provisioner_name": builders.PROVISIONER,
        "targetd_address": "127.0.0.1",
        "targetd_port": str(targetd.port),
        "targetd_password": PASSWORD,
    }
    made = IscsiTargetdProvisioner(
        IscsiTargetdSettings.from_texts(texts),
        Context(
            name=builders.PROVISIONER,
            namespace="default",
            client=cast(Client, NoVolumes()),
            events=cast(Any, NoEvents()),
            metrics=Metrics(),
        ),
    )
    # The initiators of these tests are those of the class: no nodes are watched.
    made._nodes.start = lambda: None  # type: ignore[method-assign]
    made._nodes.stop = lambda: None  # type: ignore[method-assign]
    made.start()
    yield made
    made.stop()


CLASS = {
    "targetPortal": "10.0.0.5",
    "iqn": "iqn.2003-01.org.linux-iscsi.storage:targetd",
    "initiators": "iqn.2026-01.com.example:one,iqn.2026-01.com.example:two",
    "volumeGroup": "vg-targetd",
    "fsType": "ext4",
}


def request(**parameters_too: str) -> ProvisionRequest[IscsiTargetdParameters]:
    claim = builders.claim()
    parameters = IscsiTargetdParameters.from_class({**CLASS, **parameters_too})
    return ProvisionRequest(
        volume_name=f"pvc-{claim.uid}",
        claim=claim,
        storage_class=builders.storage_class(),
        parameters=parameters,
        capacity=8 * MIB,
        selected_node=None,
        deadline=Deadline(time.monotonic() + LOST_S),
    )


def saved(made: ProvisionedVolume) -> PersistentVolume:
    """The volume as the library saves it."""
    asked = request()
    metadata = {"name": asked.volume_name, "annotations": dict(made.annotations)}
    return msgspec.convert({"metadata": metadata, "spec": dict(made.source)}, PersistentVolume)


def is_there_once(targetd: TargetdServer) -> bool:
    names = {name for _, name in targetd.model.exports.values()}
    luns = {lun for _, lun in targetd.model.exports}
    one = len(targetd.model.volumes) == len(names) == len(luns) == 1
    return one and len(targetd.model.exports) == 2


def is_gone(targetd: TargetdServer) -> bool:
    return not targetd.model.volumes and not targetd.model.exports


def persist(call: Callable[[], Any]) -> Any:
    """Call it again until it succeeds, as the library does."""
    for _ in range(TRIES):
        try:
            return call()
        except ProvisionerError:
            continue
    return call()
