"""Durable intents: what was begun is found again after a restart, on the real control plane."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from external_storage import (
    PersistentVolumeClaim,
    ProvisioningFailed,
    ProvisioningInBackground,
    StorageClass,
    Unchanged,
)
from external_storage.intents import read_intent
from external_storage.kube.errors import NotFound
from external_storage.kube.names import ANN_INTENT, INTENT_FINALIZER
from external_storage.testing import FaultProxy, builders

Until = Callable[..., Any]
CLOUD = {"durable_intent": True}
CLAIMS, VOLUMES = "persistentvolumeclaims", "persistentvolumes"


def failing(error: Exception) -> Callable[[Any], None]:
    def play(_request: Any) -> None:
        raise error

    return play


def is_gone(rig: Any, claim: str) -> bool:
    try:
        rig.get_claim(claim)
    except NotFound:
        return True
    return False


def has_intent(rig: Any, claim: str = "data") -> bool:
    meta = rig.get_claim(claim).metadata
    assert (INTENT_FINALIZER in meta.finalizers) == (ANN_INTENT in meta.annotations)
    return INTENT_FINALIZER in meta.finalizers


def begun_and_killed(rig: Any, until: Until) -> str:
    """A claim for which the backend is at work, and nobody who remembers it; its class."""
    provisioner = rig.start(declare=CLOUD)
    provisioner.on_provision = failing(ProvisioningInBackground("copying"))
    name: str = rig.storage_class(parameters={"mode": "0o700"})
    rig.claim("data", name)
    until(lambda: provisioner.provisioned, "the first call")
    # Nothing is written at a stop that a kill would not have left as well.
    rig.manager.stop()
    assert has_intent(rig)
    return name


def test_the_intent_is_there_at_the_first_call_and_gone_with_the_volume(
    rig: Any, until: Until
) -> None:
    provisioner = rig.start(declare=CLOUD)
    seen: list[bool] = []
    provisioner.on_provision = lambda _: seen.append(has_intent(rig))
    rig.claim("data", rig.storage_class())
    rig.bound("data")
    until(lambda: not has_intent(rig), "the claim is let go of")
    assert seen == [True]
    assert provisioner.provisioned == ["data"]
    rig.delete_claim("data")
    until(lambda: not rig.volumes(), "the claim can be deleted, and then its volume")
    assert provisioner.assets() == []


def test_nothing_is_begun_when_the_intent_cannot_be_written(
    proxy: FaultProxy, rig: Any, until: Until
) -> None:
    rig.plane = SimpleNamespace(kubeconfig=proxy.kubeconfig())
    provisioner = rig.start(declare=CLOUD)
    rule = proxy.on("patch", CLAIMS, times=2).fail(500)
    rig.claim("data", rig.storage_class())
    until(lambda: rule.applied == 2, "two refusals")
    rig.bound("data")
    assert provisioner.provisioned == ["data"]


def test_an_intent_that_cannot_be_ended_at_once_is_ended_later(
    proxy: FaultProxy, rig: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("external_storage.provisioning.PAUSE_S", 0.1)
    rig.plane = SimpleNamespace(kubeconfig=proxy.kubeconfig())
    provisioner = rig.start(declare=CLOUD)
    refused = []

    def refuse_from_now_on(_request: Any) -> None:
        refused.append(proxy.on("patch", CLAIMS, times=2).fail(500))

    provisioner.on_provision = refuse_from_now_on
    rig.claim("data", rig.storage_class())
    rig.bound("data")
    until(lambda: not has_intent(rig), "the claim is let go of")
    assert refused[0].applied == 2
    assert provisioner.provisioned == ["data"]


def test_a_restart_goes_on_with_what_was_begun(rig: Any, until: Until) -> None:
    begun_and_killed(rig, until)
    provisioner = rig.start(declare=CLOUD)
    rig.bound("data")
    until(lambda: not has_intent(rig), "the claim is let go of")
    assert provisioner.provisioned == ["data"]


def test_a_claim_deleted_while_we_were_down_leaves_nothing(rig: Any, until: Until) -> None:
    """The backend may have finished since: only the same call again can tell."""
    begun_and_killed(rig, until)
    rig.delete_claim("data")
    assert not is_gone(rig, "data")
    provisioner = rig.start(declare=CLOUD)
    until(lambda: is_gone(rig, "data"), "the claim is let go of")
    until(lambda: provisioner.deleted, "the volume that nobody wants is deleted")
    until(lambda: not rig.volumes(), "its object too")
    assert provisioner.assets() == []


def test_a_class_changed_while_we_were_down_does_not_change_the_call(
    rig: Any, until: Until
) -> None:
    name = begun_and_killed(rig, until)
    rig.drop(StorageClass, name)
    rig.storage_class(parameters={"mode": "0o755"})
    provisioner = rig.start(declare=CLOUD)
    rig.bound("data")
    assert [request.parameters.mode for request in provisioner.requests] == [0o700]


def test_after_a_failure_the_class_as_it_is_counts(rig: Any, until: Until) -> None:
    name = begun_and_killed(rig, until)
    rig.drop(StorageClass, name)
    rig.storage_class(parameters={"mode": "0o755"})
    provisioner = rig.start(declare=CLOUD)
    provisioner.on_provision = lambda request: (
        failing(ProvisioningFailed("no such mode"))(request)
        if request.parameters.mode == 0o700
        else None
    )
    rig.bound("data")
    assert [request.parameters.mode for request in provisioner.requests] == [0o700, 0o755]


def test_a_deleted_claim_is_let_go_of_when_its_last_call_failed(rig: Any, until: Until) -> None:
    provisioner = rig.start(declare=CLOUD)
    provisioner.on_provision = failing(ProvisioningFailed("quota"))
    rig.claim("data", rig.storage_class())
    until(lambda: provisioner.provisioned, "the first call")
    rig.delete_claim("data")
    until(lambda: is_gone(rig, "data"), "the claim is let go of")
    assert rig.volumes() == []


def test_a_deleted_claim_is_kept_while_nobody_knows_how_its_call_ended(
    rig: Any, until: Until
) -> None:
    begun_and_killed(rig, until)
    provisioner = rig.start(declare=CLOUD)
    provisioner.on_provision = failing(Unchanged("the cloud does not answer"))
    rig.delete_claim("data")
    until(lambda: len(provisioner.provisioned) >= 3, "three calls that found out nothing")
    assert has_intent(rig)
    provisioner.on_provision = failing(ProvisioningFailed("it had failed"))
    until(lambda: is_gone(rig, "data"), "the claim is let go of")


def test_a_claim_that_is_being_deleted_gets_no_intent(
    proxy: FaultProxy, rig: Any, until: Until
) -> None:
    """The watch may be slower than the claim's user: the API server has the last word."""
    rig.plane = SimpleNamespace(kubeconfig=proxy.kubeconfig())
    provisioner = rig.start(declare=CLOUD)
    go_on = threading.Event()
    rule = proxy.on("patch", CLAIMS, times=1).delay(go_on)
    hold = {"metadata": {"finalizers": ["example.com/hold"]}}
    rig.claim("data", rig.storage_class())
    until(lambda: rule.applied, "the intent is on its way")
    rig.api.patch(PersistentVolumeClaim, "data", hold, namespace=rig.namespace)
    rig.delete_claim("data")
    go_on.set()
    proxy.wait_for(lambda r: r.verb == "patch" and r.resource == CLAIMS and r.status >= 400)
    free = {"metadata": {"finalizers": None}}
    rig.api.patch(PersistentVolumeClaim, "data", free, namespace=rig.namespace)
    until(lambda: is_gone(rig, "data"), "the claim is gone")
    assert provisioner.provisioned == []


def test_a_note_that_cannot_be_read_is_no_intent() -> None:
    claim = builders.claim(annotations={ANN_INTENT: "{"})
    meta = claim.metadata
    noted = type(claim)(
        metadata=type(meta)(
            name="data", annotations=meta.annotations, finalizers=(INTENT_FINALIZER,)
        )
    )
    assert read_intent(noted) is None
    assert read_intent(claim) is None


def test_the_note_says_class_and_node_and_nothing_that_changes_by_itself(
    rig: Any, until: Until
) -> None:
    begun_and_killed(rig, until)
    note = json.loads(rig.get_claim("data").metadata.annotations[ANN_INTENT])
    assert note["storageClass"]["parameters"] == {"mode": "0o700"}
    assert set(note["storageClass"]["metadata"]) == {"name", "uid"}
