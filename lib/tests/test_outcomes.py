"""What each way for a call to end means, on the real control plane."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from external_storage import (
    Ignored,
    Infeasible,
    PersistentVolume,
    PersistentVolumeClaim,
    ProvisioningFailed,
    ProvisioningInBackground,
    Reschedule,
    StorageClass,
    Unchanged,
)
from external_storage.kube.names import ANN_SELECTED_NODE
from external_storage.kube.types import Node
from external_storage.testing import FaultProxy

Until = Callable[..., Any]


def begun_in_background(rig: Any, until: Until, claim: str = "data", **settings: str) -> Any:
    """A claim whose first call left the backend at work, and what lets it end."""
    provisioner = rig.start(**settings)
    provisioner.play(ProvisioningInBackground("copying"))
    rig.claim(claim, rig.storage_class(parameters={"mode": "0o700"}))
    until(lambda: provisioner.provisioned, "the first call")
    return provisioner


# -- in background


def test_work_in_the_background_is_asked_for_until_it_ends(rig: Any) -> None:
    provisioner = rig.start()
    busy = ProvisioningInBackground("copying")
    provisioner.play(busy, busy, None)
    rig.claim("data", rig.storage_class())
    rig.bound("data")
    assert provisioner.provisioned == ["data"] * 3
    event = rig.wait_event("data", "ProvisioningInProgress")
    assert (event.type, event.message) == ("Normal", "copying")


def test_background_work_survives_the_deletion_of_its_claim(rig: Any, until: Until) -> None:
    provisioner = begun_in_background(rig, until)
    rig.delete_claim("data")
    until(lambda: rig.claim_is_gone("data"), "claim gone")
    calls = len(provisioner.provisioned)
    until(lambda: len(provisioner.provisioned) > calls, "it is asked again")
    provisioner.play(None)
    until(lambda: provisioner.deleted, "the volume that nobody wants is deleted")
    until(lambda: not rig.volumes(), "its object too")
    assert provisioner.assets() == []


def test_background_work_goes_on_with_the_class_it_began_with(rig: Any, until: Until) -> None:
    provisioner = begun_in_background(rig, until)
    name = provisioner.requests[0].storage_class.name
    rig.drop(StorageClass, name)
    calls = len(provisioner.provisioned)
    until(lambda: len(provisioner.provisioned) > calls, "it is asked again without its class")
    rig.storage_class(parameters={"mode": "0o755"})
    calls = len(provisioner.provisioned)
    until(lambda: len(provisioner.provisioned) > calls, "and with another class of that name")
    provisioner.play(None)
    rig.bound("data")
    assert {request.parameters.mode for request in provisioner.requests} == {0o700}


def test_background_work_survives_the_threshold(rig: Any, until: Until) -> None:
    provisioner = begun_in_background(rig, until, failed_provision_threshold="2")
    until(lambda: len(provisioner.provisioned) >= 4, "more tries than the threshold")
    provisioner.play(None)
    rig.bound("data")


def test_background_work_survives_that_the_claim_gets_another_volume(
    rig: Any, until: Until
) -> None:
    provisioner = begun_in_background(rig, until)
    body = {
        "metadata": {"name": f"{rig.namespace}-by-hand"},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "capacity": {"storage": "1Gi"},
            "hostPath": {"path": "/nowhere"},
            "storageClassName": provisioner.requests[0].storage_class.name,
            "persistentVolumeReclaimPolicy": "Retain",
        },
    }
    by_hand = rig.api.create(PersistentVolume, body)
    try:
        assert rig.bound("data").name == by_hand.name
        provisioner.play(None)
        until(lambda: provisioner.deleted, "the volume that came too late is deleted")
        until(lambda: not rig.volumes(), "its object too")
        assert rig.get_claim("data").spec.volume_name == by_hand.name
    finally:
        rig.drop(PersistentVolume, by_hand.name)


def test_a_failure_ends_what_was_in_the_background(rig: Any, until: Until) -> None:
    provisioner = begun_in_background(rig, until)
    provisioner.play(ProvisioningFailed("no"))
    rig.wait_event("data", "ProvisioningFailed")
    rig.delete_claim("data")
    until(lambda: rig.claim_is_gone("data"), "claim gone")
    rig.claim("next", provisioner.requests[0].storage_class.name)
    provisioner.play(None)
    rig.bound("next")
    assert [volume.spec.claim_ref.name for volume in rig.volumes()] == ["next"]


def test_unchanged_leaves_background_work_in_the_background(rig: Any, until: Until) -> None:
    provisioner = rig.start()
    provisioner.play(ProvisioningInBackground("copying"), Unchanged("no answer"))
    rig.claim("data", rig.storage_class())
    until(lambda: len(provisioner.provisioned) >= 3, "two calls that found out nothing")
    rig.delete_claim("data")
    until(lambda: rig.claim_is_gone("data"), "claim gone")
    provisioner.play(None)
    until(lambda: provisioner.deleted, "what ended after all is deleted")


def test_unchanged_on_the_first_call_leaves_nothing_to_ask_for(rig: Any, until: Until) -> None:
    provisioner = rig.start()
    provisioner.play(Unchanged("no answer"))
    rig.claim("data", rig.storage_class())
    until(lambda: provisioner.provisioned, "the first call")
    assert rig.wait_event("data", "ProvisioningInProgress").type == "Normal"
    rig.delete_claim("data")
    registry = provisioner.context.metrics.registry
    until(
        lambda: (
            registry.get_sample_value("external_storage_claims_queue_waiting") == 0
            and registry.get_sample_value("external_storage_claims_queue_in_progress") == 0
        ),
        "the claim is forgotten",
    )
    assert registry.get_sample_value("external_storage_open_calls") == 0


# -- final outcomes


@pytest.mark.parametrize("error", [ProvisioningFailed, Infeasible])
def test_the_threshold_is_exactly_that_many_tries(rig: Any, until: Until, error: type) -> None:
    """The slow retry of what is infeasible counts like any other."""
    provisioner = rig.start(failed_provision_threshold="3", retry_interval_max="0.2")
    provisioner.play(error("broken"))
    storage_class = rig.storage_class()
    rig.claim("data", storage_class)
    until(
        lambda: any("Given up after 3 tries" in e.message for e in rig.events("data")),
        "the user is told",
    )
    note = {"metadata": {"annotations": {"example.com/note": "an update is no reason to try"}}}
    rig.api.patch(PersistentVolumeClaim, "data", note, namespace=rig.namespace)
    rig.claim("later", rig.storage_class("-b"))
    until(lambda: provisioner.provisioned.count("later") == 3, "another claim has its own tries")
    assert provisioner.provisioned.count("data") == 3
    rig.drop(StorageClass, storage_class)
    provisioner.play(None)
    rig.storage_class()
    rig.bound("data")


def test_a_claim_that_was_given_up_is_forgotten_with_its_deletion(rig: Any, until: Until) -> None:
    provisioner = rig.start(failed_provision_threshold="1")
    provisioner.play(ProvisioningFailed("broken"))
    rig.claim("data", rig.storage_class())
    until(lambda: rig.events("data", "ProvisioningFailed"), "the user is told")
    registry = provisioner.context.metrics.registry
    waiting = "external_storage_claims_queue_waiting"
    assert registry.get_sample_value(waiting) == 1
    rig.delete_claim("data")
    until(lambda: registry.get_sample_value(waiting) == 0, "its key is gone")


def test_an_error_counts_as_what_it_was_raised_from(rig: Any, until: Until) -> None:
    provisioner = rig.start()

    def wrapped(_request: Any) -> None:
        try:
            raise Ignored("the other data centre serves it")
        except Ignored as error:
            raise RuntimeError("placement failed") from error

    provisioner.on_provision = wrapped
    rig.claim("data", rig.storage_class())
    until(lambda: provisioner.provisioned, "the call")
    provisioner.play(None)
    rig.claim("other", provisioner.requests[0].storage_class.name)
    rig.bound("other")
    assert provisioner.provisioned == ["data", "other"]
    assert rig.events("data", "ProvisioningFailed") == []


# -- rescheduling


@pytest.fixture
def waiting_class(rig: Any) -> str:
    name: str = rig.storage_class("-wait", volumeBindingMode="WaitForFirstConsumer")
    return name


def selected(rig: Any, node: str | None) -> None:
    """What the scheduler does."""
    patch = {"metadata": {"annotations": {ANN_SELECTED_NODE: node}}}
    rig.api.patch(PersistentVolumeClaim, "data", patch, namespace=rig.namespace)


def unselected(rig: Any) -> bool:
    return ANN_SELECTED_NODE not in rig.get_claim("data").metadata.annotations


def test_reschedule_gives_the_claim_back_to_the_scheduler(
    rig: Any, until: Until, waiting_class: str
) -> None:
    provisioner = rig.start()
    full, other = rig.node("-full"), rig.node("-other")
    provisioner.play(Reschedule("no space on the node"), None)
    rig.claim("data", waiting_class, annotations={ANN_SELECTED_NODE: full})
    until(lambda: unselected(rig), "the node is taken back")
    assert "no space on the node" in rig.wait_event("data", "ProvisioningFailed").message
    selected(rig, other)
    rig.bound("data")
    assert [request.selected_node for request in provisioner.requests] == [full, other]


def test_a_node_that_is_gone_is_given_back_without_a_call(
    rig: Any, until: Until, waiting_class: str
) -> None:
    provisioner = rig.start()
    there = rig.node()
    rig.claim("data", waiting_class, annotations={ANN_SELECTED_NODE: "no-such-node"})
    until(lambda: unselected(rig), "the node is taken back")
    assert "no-such-node does not exist" in rig.wait_event("data", "ProvisioningFailed").message
    assert provisioner.provisioned == []
    selected(rig, there)
    rig.bound("data")


def test_background_work_on_a_node_that_is_gone_is_not_left(
    rig: Any, until: Until, waiting_class: str
) -> None:
    provisioner = rig.start()
    provisioner.play(ProvisioningInBackground("copying"))
    node = rig.node()
    rig.claim("data", waiting_class, annotations={ANN_SELECTED_NODE: node})
    until(lambda: provisioner.provisioned, "the first call")
    rig.drop(Node, node)
    calls = len(provisioner.provisioned)
    until(lambda: len(provisioner.provisioned) >= calls + 2, "it is asked again")
    assert not unselected(rig)
    provisioner.play(None)
    rig.bound("data")


def test_reschedule_of_a_claim_without_a_node_is_a_failure(rig: Any) -> None:
    provisioner = rig.start()
    provisioner.play(Reschedule("nowhere"), None)
    rig.claim("data", rig.storage_class())
    rig.bound("data")
    assert provisioner.provisioned == ["data"] * 2


# -- calls that hang


def test_a_call_that_hangs_is_told_counted_never_doubled_and_not_waited_for(
    rig: Any, until: Until, release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("external_storage.calls.OVERRUN_S", 0.2)
    provisioner = rig.start(timeout="0.1", worker_threads="1", shutdown_timeout="30")

    def hang(request: Any) -> None:
        if request.claim.name == "hangs":
            assert provisioner.deadline is request.deadline
            release.wait()

    provisioner.on_provision = hang
    rig.claim("hangs", rig.storage_class())
    event = rig.wait_event("hangs", "BackendStuck")
    assert (event.type, event.count) == ("Warning", 1)
    registry = provisioner.context.metrics.registry
    assert registry.get_sample_value("external_storage_stuck_calls") == 1
    rig.claim("other-class", rig.storage_class("-b"))
    rig.bound("other-class")
    note = {"metadata": {"annotations": {"example.com/note": "update"}}}
    rig.api.patch(PersistentVolumeClaim, "hangs", note, namespace=rig.namespace)
    rig.drop(StorageClass, provisioner.requests[0].storage_class.name)
    rig.storage_class()
    rig.claim("another", rig.storage_class("-c"))
    rig.bound("another")
    assert provisioner.provisioned.count("hangs") == 1
    # It would be waited for until the shutdown timeout if it were not known to hang.
    stopped = threading.Thread(target=rig.manager.stop)
    stopped.start()
    stopped.join(10)
    assert not stopped.is_alive()
    assert [e.count for e in rig.events("hangs", "BackendStuck")] == [1]


def test_work_in_the_background_does_not_use_up_the_tries(rig: Any) -> None:
    provisioner = rig.start(failed_provision_threshold="2", retry_interval_max="0.2")
    busy = ProvisioningInBackground("copying")
    provisioner.play(busy, busy, busy, ProvisioningFailed("once"), None)
    rig.claim("data", rig.storage_class())
    rig.bound("data")


@pytest.mark.parametrize("resource", ["persistentvolumes", "persistentvolumeclaims"])
def test_a_conflict_that_says_nothing_of_the_object_is_tried_again(
    proxy: FaultProxy, rig: Any, until: Until, waiting_class: str, resource: str
) -> None:
    """The API server says 409 of two who write at once, too."""
    rig.plane = SimpleNamespace(kubeconfig=proxy.kubeconfig())
    provisioner = rig.start()
    node = rig.node()
    if resource == "persistentvolumeclaims":
        rule = proxy.on("patch", resource, times=1).fail(409)
        provisioner.play(Reschedule("full"))
        rig.claim("data", waiting_class, annotations={ANN_SELECTED_NODE: node})
        until(lambda: unselected(rig), "the node is taken back")
    else:
        rig.claim("data", rig.storage_class())
        volume = rig.bound("data")
        rule = proxy.on("patch", resource, times=1).fail(409)
        rig.delete_claim("data")
        until(lambda: rig.is_gone(PersistentVolume, volume.name), "the finalizer is removed")
    assert rule.applied == 1


def test_reconciling_leaves_the_keys_of_a_class_in_its_share(
    rig: Any, until: Until, release: threading.Event
) -> None:
    provisioner = rig.start(declare={"keeps_records": True}, worker_threads="1")
    busy = threading.Event()

    def hang(request: Any) -> None:
        if request.claim.name.startswith("slow"):
            busy.set()
            release.wait(60)

    provisioner.on_provision = hang
    slow = rig.storage_class("-slow")
    rig.claim("slow", slow)
    assert busy.wait(60)
    provisioner.context.reconcile_soon()
    until(lambda: len(provisioner.reconciled) >= 2, "a round in between")
    rig.claim("slow-too", slow)
    rig.claim("quick", rig.storage_class())
    rig.bound("quick")
    assert provisioner.provisioned.count("slow-too") == 0
    release.set()
    rig.bound("slow-too")
