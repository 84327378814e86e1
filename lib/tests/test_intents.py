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
from external_storage.kube.names import ANN_INTENT, ANN_SELECTED_NODE, INTENT_FINALIZER
from external_storage.kube.types import Node
from external_storage.testing import FaultProxy

Until = Callable[..., Any]
CLOUD = {"durable_intent": True}
CLAIMS, VOLUMES = "persistentvolumeclaims", "persistentvolumes"


def has_intent(rig: Any, claim: str = "data") -> bool:
    meta = rig.get_claim(claim).metadata
    assert (INTENT_FINALIZER in meta.finalizers) == (ANN_INTENT in meta.annotations)
    return INTENT_FINALIZER in meta.finalizers


def begun_and_killed(rig: Any, until: Until) -> str:
    """A claim for which the backend is at work, and nobody who remembers it; its class."""
    provisioner = rig.start(declare=CLOUD)
    provisioner.play(ProvisioningInBackground("copying"))
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


def test_an_intent_is_ended_later_though_the_volume_is_seen_later_than_its_binding(
    proxy: FaultProxy, rig: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("external_storage.provisioning.PAUSE_S", 0.1)
    rig.plane = SimpleNamespace(kubeconfig=proxy.kubeconfig())
    provisioner = rig.start(declare=CLOUD)
    seen = threading.Event()
    proxy.lag("persistentvolumes", seen)
    provisioner.on_provision = lambda _request: proxy.on("patch", CLAIMS).fail(500)
    rig.claim("data", rig.storage_class())
    rig.bound("data")
    try:
        until(lambda: not has_intent(rig), "the claim is let go of")
    finally:
        seen.set()


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
    assert not rig.claim_is_gone("data")
    provisioner = rig.start(declare=CLOUD)
    until(
        lambda: rig.claim_is_gone("data"),
        "the claim is let go of",
    )
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

    def refuse_one_mode(request: Any) -> None:
        if request.parameters.mode == 0o700:
            raise ProvisioningFailed("no such mode")

    provisioner.on_provision = refuse_one_mode
    rig.bound("data")
    assert [request.parameters.mode for request in provisioner.requests] == [0o700, 0o755]


def test_a_deleted_claim_is_let_go_of_when_its_last_call_failed(rig: Any, until: Until) -> None:
    provisioner = rig.start(declare=CLOUD)
    provisioner.play(ProvisioningFailed("quota"))
    rig.claim("data", rig.storage_class())
    until(lambda: provisioner.provisioned, "the first call")
    rig.delete_claim("data")
    until(
        lambda: rig.claim_is_gone("data"),
        "the claim is let go of",
    )
    assert rig.volumes() == []


def test_a_deleted_claim_is_kept_while_nobody_knows_how_its_call_ended(
    rig: Any, until: Until
) -> None:
    begun_and_killed(rig, until)
    provisioner = rig.start(declare=CLOUD)
    provisioner.play(Unchanged("the cloud does not answer"))
    rig.delete_claim("data")
    until(lambda: len(provisioner.provisioned) >= 3, "three calls that found out nothing")
    assert has_intent(rig)
    provisioner.play(ProvisioningFailed("it had failed"))
    until(
        lambda: rig.claim_is_gone("data"),
        "the claim is let go of",
    )


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
    until(
        lambda: rig.claim_is_gone("data"),
        "the claim is gone",
    )
    assert provisioner.provisioned == []


def test_the_note_says_what_the_call_was_made_with(rig: Any, until: Until) -> None:
    begun_and_killed(rig, until)
    claim = rig.get_claim("data")
    note = json.loads(claim.metadata.annotations[ANN_INTENT].partition(" ")[2])
    assert note["volumeName"] == f"pvc-{claim.uid}"
    assert note["capacity"] == 2**30
    assert note["storageClass"]["parameters"] == {"mode": "0o700"}
    assert set(note["storageClass"]["metadata"]) == {"name", "uid"}


# -- what somebody else has written there


def forge(rig: Any, note: str, *, claim: str = "data") -> None:
    metadata = {"annotations": {ANN_INTENT: note}, "finalizers": [INTENT_FINALIZER]}
    body = {"metadata": metadata}
    rig.api.patch(PersistentVolumeClaim, claim, body, namespace=rig.namespace)


@pytest.mark.parametrize("signed_for_another", [False, True])
def test_a_note_that_a_user_wrote_is_never_acted_on(
    rig: Any, until: Until, signed_for_another: bool
) -> None:
    begun_and_killed(rig, until)
    signed = rig.get_claim("data").metadata.annotations[ANN_INTENT]
    signature, _, text = signed.partition(" ")
    note = signed if signed_for_another else f"{signature} {text.replace('0o700', '0o777')}"
    waiting = rig.storage_class("-wait", volumeBindingMode="WaitForFirstConsumer")
    rig.claim("forged", waiting)
    forge(rig, note, claim="forged")
    plain = rig.storage_class("-plain", parameters={"mode": "0o750"})
    rig.claim("other", plain)
    forge(rig, note, claim="other")
    provisioner = rig.start(declare=CLOUD)
    rig.bound("data")
    rig.bound("other")
    modes = {request.claim.name: request.parameters.mode for request in provisioner.requests}
    assert modes == {"data": 0o700, "other": 0o750}


def test_a_provisioner_without_intents_ends_none(rig: Any, until: Until) -> None:
    begun_and_killed(rig, until)
    rig.delete_claim("data")
    provisioner = rig.start()
    rig.claim("other", rig.storage_class("-b"))
    rig.bound("other")
    assert has_intent(rig)
    assert provisioner.provisioned == ["other"]
    rig.manager.stop()
    rig.start(declare=CLOUD)
    until(
        lambda: rig.claim_is_gone("data"),
        "who has intents ends it",
    )


def test_a_claim_whose_note_is_lost_is_let_go_of(rig: Any, until: Until) -> None:
    """By the class that is there: it is asked once more, and what that made is deleted."""
    begun_and_killed(rig, until)
    forge(rig, "lost")
    rig.delete_claim("data")
    provisioner = rig.start(declare=CLOUD)
    until(
        lambda: rig.claim_is_gone("data"),
        "the claim is let go of",
    )
    until(lambda: provisioner.deleted and not rig.volumes(), "nothing is left")


# -- where it can go on


def test_what_another_instance_has_begun_is_left_to_it(rig: Any, until: Until) -> None:
    alone = {**CLOUD, "owns_assets": True, "identity": "one"}
    first = rig.start(declare=alone)
    first.play(ProvisioningInBackground("copying"))
    storage_class = rig.storage_class()
    rig.claim("data", storage_class)
    until(lambda: first.provisioned, "the first call")
    rig.manager.stop()
    second = rig.start(declare={**alone, "identity": "two"})
    rig.claim("other", storage_class)
    rig.bound("other")
    assert second.provisioned == ["other"]
    assert has_intent(rig)
    rig.manager.stop()
    rig.start(declare=alone)
    rig.bound("data")


def test_the_call_is_made_again_for_the_node_and_the_source_it_was_made_for(
    rig: Any, until: Until
) -> None:
    declare = {**CLOUD, "supports_clone": True}
    first = rig.start(declare=declare)
    storage_class = rig.storage_class()
    rig.claim("source", storage_class)
    source = rig.bound("source")
    waiting = rig.storage_class("-wait", volumeBindingMode="WaitForFirstConsumer")
    node = rig.node()
    first.play(ProvisioningInBackground("copying"))
    reference = {"kind": "PersistentVolumeClaim", "name": "source"}
    selected = {ANN_SELECTED_NODE: node}
    rig.claim("clone", waiting, annotations=selected, dataSource=reference)
    until(lambda: "clone" in first.provisioned, "the first call")
    rig.manager.stop()
    rig.drop(Node, node)
    rig.delete_claim("clone")
    rig.delete_claim("source")
    second = rig.start(declare=declare)
    until(
        lambda: rig.claim_is_gone("clone"),
        "the clone is let go of",
    )
    asked = next(request for request in second.requests if request.claim.name == "clone")
    assert asked.selected_node == node
    assert asked.source_volume.name == source.name
    until(lambda: not rig.volumes(), "nothing is left")


def test_an_intent_is_ended_though_the_class_became_anothers(rig: Any, until: Until) -> None:
    provisioner = rig.start(declare=CLOUD)
    provisioner.play(ProvisioningInBackground("copying"))
    name = rig.storage_class()
    rig.claim("data", name)
    until(lambda: provisioner.provisioned, "the first call")
    rig.drop(StorageClass, name)
    own, rig.name = rig.name, "example.com/other"
    rig.storage_class()
    rig.name = own
    claimed = "volume.kubernetes.io/storage-provisioner"
    until(
        lambda: rig.get_claim("data").metadata.annotations.get(claimed) == "example.com/other",
        "the controller manager has asked the other one",
    )
    provisioner.on_provision = lambda _: None
    rig.bound("data")
    until(lambda: not has_intent(rig), "the claim is let go of")


def test_what_failed_before_another_replica_led_is_asked_again(
    rig: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    provisioner = rig.start(declare=CLOUD)
    led: list[int] = []
    monkeypatch.setattr(provisioner, "lead", lambda: led.append(len(provisioner.provisioned)))
    provisioner.play(ProvisioningFailed("quota"))
    rig.claim("data", rig.storage_class())
    until(lambda: provisioner.provisioned, "the first call")
    controller = rig.controller()
    controller.follow()
    for queue in controller._queues:
        queue.pause()
    until(lambda: controller._claim_queue.working() == 0, "no call is going on")
    calls = len(provisioner.provisioned)
    rig.delete_claim("data")
    controller.lead()
    until(
        lambda: rig.claim_is_gone("data"),
        "the claim is let go of",
    )
    assert len(provisioner.provisioned) > calls
    # Told before the first call.
    assert led == [calls]


@pytest.mark.parametrize("status", [409, 422])
def test_a_refusal_that_says_nothing_of_the_claim_is_tried_again(
    proxy: FaultProxy, rig: Any, status: int
) -> None:
    rig.plane = SimpleNamespace(kubeconfig=proxy.kubeconfig())
    provisioner = rig.start(declare=CLOUD)
    proxy.on("patch", CLAIMS, times=1).fail(status)
    rig.claim("data", rig.storage_class())
    rig.bound("data")
    assert provisioner.provisioned == ["data"]
