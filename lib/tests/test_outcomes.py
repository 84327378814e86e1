"""What each way for a call to end means, on the real control plane."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from external_storage import (
    Ignored,
    Infeasible,
    PersistentVolume,
    PersistentVolumeClaim,
    ProvisionedVolume,
    ProvisioningFailed,
    ProvisioningInBackground,
    Reschedule,
    StorageClass,
    Unchanged,
    VolumeInUse,
)
from external_storage.kube.errors import NotFound
from external_storage.kube.names import ANN_SELECTED_NODE
from external_storage.kube.types import Node
from external_storage.testing import FaultProxy

Until = Callable[..., Any]


def script(*outcomes: BaseException | None) -> Callable[[Any], None]:
    """One outcome for each call; the last one for all that follow."""
    left = list(outcomes)

    def play(_request: Any) -> None:
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if outcome is not None:
            raise outcome

    return play


def begun_in_background(rig: Any, until: Until, claim: str = "data", **settings: str) -> Any:
    """A claim whose first call left the backend at work, and what lets it end."""
    provisioner = rig.start(**settings)
    provisioner.on_provision = script(ProvisioningInBackground("copying"))
    rig.claim(claim, rig.storage_class(parameters={"mode": "0o700"}))
    until(lambda: provisioner.provisioned, "the first call")
    return provisioner


def gone(rig: Any, kind: type, name: str, **where: str) -> bool:
    try:
        rig.api.get(kind, name, **where)
    except NotFound:
        return True
    return False


# -- in background


def test_work_in_the_background_is_asked_for_until_it_ends(rig: Any) -> None:
    provisioner = rig.start()
    busy = ProvisioningInBackground("copying")
    provisioner.on_provision = script(busy, busy, None)
    rig.claim("data", rig.storage_class())
    rig.bound("data")
    assert provisioner.provisioned == ["data"] * 3
    event = rig.wait_event("data", "ProvisioningInProgress")
    assert (event.type, event.message) == ("Normal", "copying")


def test_background_work_survives_the_deletion_of_its_claim(rig: Any, until: Until) -> None:
    provisioner = begun_in_background(rig, until)
    rig.delete_claim("data")
    until(lambda: gone(rig, PersistentVolumeClaim, "data", namespace=rig.namespace), "claim gone")
    calls = len(provisioner.provisioned)
    until(lambda: len(provisioner.provisioned) > calls, "it is asked again")
    provisioner.on_provision = script(None)
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
    provisioner.on_provision = script(None)
    rig.bound("data")
    assert {request.parameters.mode for request in provisioner.requests} == {0o700}


def test_background_work_survives_the_threshold(rig: Any, until: Until) -> None:
    provisioner = begun_in_background(rig, until, failed_provision_threshold="2")
    until(lambda: len(provisioner.provisioned) >= 4, "more tries than the threshold")
    provisioner.on_provision = script(None)
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
        provisioner.on_provision = script(None)
        until(lambda: provisioner.deleted, "the volume that came too late is deleted")
        until(lambda: not rig.volumes(), "its object too")
        assert rig.get_claim("data").spec.volume_name == by_hand.name
    finally:
        rig.drop(PersistentVolume, by_hand.name)


def test_a_failure_ends_what_was_in_the_background(rig: Any, until: Until) -> None:
    provisioner = begun_in_background(rig, until)
    provisioner.on_provision = script(ProvisioningFailed("no"))
    rig.wait_event("data", "ProvisioningFailed")
    rig.delete_claim("data")
    until(lambda: gone(rig, PersistentVolumeClaim, "data", namespace=rig.namespace), "claim gone")
    rig.claim("next", provisioner.requests[0].storage_class.name)
    provisioner.on_provision = script(None)
    rig.bound("next")
    assert [volume.spec.claim_ref.name for volume in rig.volumes()] == ["next"]


def test_unchanged_leaves_background_work_in_the_background(rig: Any, until: Until) -> None:
    provisioner = rig.start()
    provisioner.on_provision = script(ProvisioningInBackground("copying"), Unchanged("no answer"))
    rig.claim("data", rig.storage_class())
    until(lambda: len(provisioner.provisioned) >= 3, "two calls that found out nothing")
    rig.delete_claim("data")
    until(lambda: gone(rig, PersistentVolumeClaim, "data", namespace=rig.namespace), "claim gone")
    provisioner.on_provision = script(None)
    until(lambda: provisioner.deleted, "what ended after all is deleted")


def test_unchanged_on_the_first_call_leaves_nothing_to_ask_for(rig: Any, until: Until) -> None:
    provisioner = rig.start()
    provisioner.on_provision = script(Unchanged("no answer"))
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
    provisioner.on_provision = script(error("broken"))
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
    provisioner.on_provision = script(None)
    rig.storage_class()
    rig.bound("data")


def test_a_claim_that_was_given_up_is_forgotten_with_its_deletion(rig: Any, until: Until) -> None:
    provisioner = rig.start(failed_provision_threshold="1")
    provisioner.on_provision = script(ProvisioningFailed("broken"))
    rig.claim("data", rig.storage_class())
    until(lambda: rig.events("data", "ProvisioningFailed"), "the user is told")
    registry = provisioner.context.metrics.registry
    waiting = "external_storage_claims_queue_waiting"
    assert registry.get_sample_value(waiting) == 1
    rig.delete_claim("data")
    until(lambda: registry.get_sample_value(waiting) == 0, "its key is gone")


def test_the_threshold_of_deletes_is_exactly_that_many_tries(rig: Any, until: Until) -> None:
    provisioner = rig.start(failed_delete_threshold="2")

    def refuse(_volume: PersistentVolume) -> None:
        raise ProvisioningFailed("in repair")

    provisioner.on_delete = refuse
    rig.claim("data", rig.storage_class())
    volume = rig.bound("data")
    rig.delete_claim("data")
    until(
        lambda: any("Given up after 2 tries" in e.message for e in rig.events(volume.name)),
        "the admin is told",
    )
    rig.claim("other", provisioner.requests[0].storage_class.name)
    rig.bound("other")
    assert provisioner.deleted == [volume.name] * 2
    provisioner.on_delete = lambda _: None
    change = {"spec": {"mountOptions": ["noatime"]}}
    rig.api.patch(PersistentVolume, volume.name, change)
    until(lambda: gone(rig, PersistentVolume, volume.name), "a change of the volume is a new try")


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
    provisioner.on_provision = script(None)
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
    provisioner.on_provision = script(Reschedule("no space on the node"), None)
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
    provisioner.on_provision = script(ProvisioningInBackground("copying"))
    node = rig.node()
    rig.claim("data", waiting_class, annotations={ANN_SELECTED_NODE: node})
    until(lambda: provisioner.provisioned, "the first call")
    rig.drop(Node, node)
    calls = len(provisioner.provisioned)
    until(lambda: len(provisioner.provisioned) >= calls + 2, "it is asked again")
    assert not unselected(rig)
    provisioner.on_provision = script(None)
    rig.bound("data")


def test_reschedule_of_a_claim_without_a_node_is_a_failure(rig: Any) -> None:
    provisioner = rig.start()
    provisioner.on_provision = script(Reschedule("nowhere"), None)
    rig.claim("data", rig.storage_class())
    rig.bound("data")
    assert provisioner.provisioned == ["data"] * 2


# -- calls that hang


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


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


# -- what may be asked for


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"volumeMode": "Block"}, "volumeMode Block is not supported"),
        ({"selector": {"matchLabels": {"a": "b"}}}, "spec.selector is not supported"),
        ({"accessModes": ["ReadWriteOncePod"]}, "use ReadWriteMany, ReadWriteOnce"),
        ({"volumeAttributesClassName": "gold"}, "volumeAttributesClassName is not supported"),
        (
            {"dataSource": {"kind": "PersistentVolumeClaim", "name": "other"}},
            "cloning is not supported",
        ),
    ],
)
def test_what_the_provisioner_cannot_give_is_refused_with_an_event(
    rig: Any, spec: dict[str, Any], text: str
) -> None:
    modes = frozenset({"ReadWriteOnce", "ReadWriteMany"})
    provisioner = rig.start(declare={"access_modes": modes})
    rig.claim("data", rig.storage_class(), **spec)
    event = rig.wait_event("data", "ProvisioningFailed")
    assert event.type == "Warning"
    assert text in event.message
    assert provisioner.provisioned == []


def test_block_and_read_write_once_pod_are_given_where_they_are_supported(rig: Any) -> None:
    rig.start(declare={"supports_block": True})
    spec = {"volumeMode": "Block", "accessModes": ["ReadWriteOncePod"]}
    rig.claim("data", rig.storage_class(), **spec)
    volume = rig.bound("data")
    assert (volume.spec.volume_mode, volume.spec.access_modes) == ("Block", ("ReadWriteOncePod",))


def test_unknown_parameters_are_only_warned_of_where_classes_exist_already(rig: Any) -> None:
    rig.start(lenient_parameters="true")
    rig.claim("data", rig.storage_class(parameters={"archiveOnDelete": "true", "mode": "0o700"}))
    rig.bound("data")
    event = rig.wait_event("data", "UnknownParameters")
    assert event.type == "Warning"
    assert "'archiveOnDelete'" in event.message


def test_allowed_topologies_bind_a_volume_that_says_nothing_of_nodes(rig: Any) -> None:
    rig.start()
    terms = [
        {"matchLabelExpressions": [{"key": "topology.kubernetes.io/zone", "values": ["a", "b"]}]},
        {"matchLabelExpressions": [{"key": "topology.kubernetes.io/zone", "values": ["c"]}]},
    ]
    rig.claim("data", rig.storage_class(allowedTopologies=terms))
    affinity = rig.bound("data").spec.node_affinity
    assert affinity is not None
    assert affinity.required is not None
    found = [term.match_expressions[0] for term in affinity.required.node_selector_terms]
    assert [(one.operator, one.values) for one in found] == [("In", ("a", "b")), ("In", ("c",))]


def test_names_follow_the_template(rig: Any) -> None:
    template = "${.PVC.namespace}-${.PVC.name}-${.PVC.uid}"
    provisioner = rig.start(volume_name_template=template)
    claim = rig.claim("data", rig.storage_class())
    assert rig.bound("data").name == f"{rig.namespace}-data-{claim.uid}"
    long_name = "x" * 230
    rig.claim(long_name, provisioner.requests[0].storage_class.name)
    event = rig.wait_event(long_name, "ProvisioningFailed")
    assert "253 are allowed" in event.message


def test_other_names_of_a_predecessor_are_answered_to(rig: Any, until: Until) -> None:
    own = rig.name
    storage_class = rig.storage_class()
    rig.name = f"{own}-new"
    provisioner = rig.start(additional_provisioner_names=own)
    rig.claim("data", storage_class)
    volume = rig.bound("data")
    assert volume.metadata.annotations["pv.kubernetes.io/provisioned-by"] == own
    rig.delete_claim("data")
    until(lambda: provisioner.deleted == [volume.name], "its volume is deleted too")
    until(lambda: gone(rig, PersistentVolume, volume.name), "and its object")


def test_a_volume_that_is_deleted_while_it_is_free_goes_and_its_data_stays(
    rig: Any, until: Until
) -> None:
    provisioner = rig.start()
    rig.claim("data", rig.storage_class())
    volume = rig.bound("data")
    rig.api.patch(
        PersistentVolume, volume.name, {"spec": {"persistentVolumeReclaimPolicy": "Retain"}}
    )
    rig.delete_claim("data")
    until(lambda: rig.api.get(PersistentVolume, volume.name).status.phase == "Released", "released")
    free = {"spec": {"claimRef": None, "persistentVolumeReclaimPolicy": "Retain"}}
    rig.api.patch(PersistentVolume, volume.name, free)
    until(lambda: rig.api.get(PersistentVolume, volume.name).status.phase == "Available", "free")
    held = {
        "metadata": {"finalizers": ["external-provisioner.volume.kubernetes.io/finalizer"]},
        "spec": {"persistentVolumeReclaimPolicy": "Delete"},
    }
    rig.api.patch(PersistentVolume, volume.name, held)
    rig.drop(PersistentVolume, volume.name)
    until(lambda: gone(rig, PersistentVolume, volume.name), "the object is not held back")
    assert provisioner.deleted == []
    assert provisioner.assets() == [volume.name]
    assert rig.wait_event(volume.name, "AssetKept").type == "Warning"


def test_an_author_whose_source_is_a_clone_gets_the_volume(rig: Any, until: Until) -> None:
    provisioner = rig.start(declare={"supports_clone": True})
    storage_class = rig.storage_class()
    rig.claim("original", storage_class)
    original = rig.bound("original")
    source = {"kind": "PersistentVolumeClaim", "name": "original"}
    rig.claim("clone", storage_class, dataSource=source)
    rig.bound("clone")
    assert provisioner.requests[-1].source_volume.name == original.name
    small = {"resources": {"requests": {"storage": "1Mi"}}}
    rig.claim("small", storage_class, dataSource=source, **small)
    assert "cannot be smaller" in rig.wait_event("small", "ProvisioningFailed").message
    missing = {"kind": "PersistentVolumeClaim", "name": "missing"}
    rig.claim("early", storage_class, dataSource=missing)
    text = "the source claim missing does not exist"
    assert text in rig.wait_event("early", "ProvisioningFailed").message
    rig.claim("missing", storage_class)
    rig.bound("early")


def test_the_source_of_a_clone_is_not_deleted_under_it(
    rig: Any, until: Until, release: threading.Event
) -> None:
    provisioner = rig.start(declare={"supports_clone": True})
    storage_class = rig.storage_class()
    rig.claim("original", storage_class)
    original = rig.bound("original")
    copying = threading.Event()

    def copy(request: Any) -> ProvisionedVolume | None:
        copying.set()
        release.wait(60)
        return None

    provisioner.on_provision = copy
    source = {"kind": "PersistentVolumeClaim", "name": "original"}
    rig.claim("clone", storage_class, dataSource=source)
    assert copying.wait(60)
    rig.delete_claim("original")
    rig.wait_event(original.name, "VolumeInUse")
    assert provisioner.deleted == []
    release.set()
    rig.bound("clone")
    until(lambda: provisioner.deleted == [original.name], "then it is deleted")


def test_a_volume_from_another_source_is_left_to_a_populator(rig: Any) -> None:
    provisioner = rig.start()
    storage_class = rig.storage_class()
    source = {"apiGroup": "example.com", "kind": "Backup", "name": "monday"}
    rig.claim("data", storage_class, dataSourceRef=source)
    event = rig.wait_event("data", "LeftToPopulator")
    assert (event.type, event.count) == ("Normal", 1)
    assert "Backup.example.com" in event.message
    rig.claim("plain", storage_class)
    rig.bound("plain")
    assert provisioner.provisioned == ["plain"]


def test_the_source_of_a_clone_in_the_background_is_not_deleted(rig: Any, until: Until) -> None:
    provisioner = rig.start(declare={"supports_clone": True})
    storage_class = rig.storage_class()
    rig.claim("original", storage_class)
    original = rig.bound("original")
    provisioner.on_provision = script(ProvisioningInBackground("copying"), Unchanged("no answer"))
    source = {"kind": "PersistentVolumeClaim", "name": "original"}
    rig.claim("clone", storage_class, dataSource=source)
    until(lambda: provisioner.provisioned.count("clone") >= 2, "it is asked again")
    rig.delete_claim("original")
    rig.wait_event(original.name, "VolumeInUse")
    assert provisioner.deleted == []
    provisioner.on_provision = script(None)
    rig.bound("clone")
    until(lambda: provisioner.deleted == [original.name], "then it is deleted")


def test_a_volume_in_use_does_not_use_up_the_tries_to_delete_it(rig: Any, until: Until) -> None:
    provisioner = rig.start(failed_delete_threshold="2", retry_interval_max="0.2")
    errors: list[Exception] = [VolumeInUse("mounted")] * 4 + [ProvisioningFailed("in repair")]

    def play(_volume: PersistentVolume) -> None:
        if errors:
            raise errors.pop(0)

    provisioner.on_delete = play
    rig.claim("data", rig.storage_class())
    volume = rig.bound("data")
    rig.delete_claim("data")
    until(lambda: gone(rig, PersistentVolume, volume.name), "one failure is not two")


def test_work_in_the_background_does_not_use_up_the_tries(rig: Any) -> None:
    provisioner = rig.start(failed_provision_threshold="2", retry_interval_max="0.2")
    busy = ProvisioningInBackground("copying")
    provisioner.on_provision = script(busy, busy, busy, ProvisioningFailed("once"), None)
    rig.claim("data", rig.storage_class())
    rig.bound("data")


def test_a_released_volume_that_an_admin_gives_to_another_claim_is_kept(
    rig: Any, until: Until
) -> None:
    provisioner = rig.start(retry_interval_max="0.2")

    def in_use(_volume: PersistentVolume) -> None:
        raise VolumeInUse("an admin looks at it")

    provisioner.on_delete = in_use
    storage_class = rig.storage_class()
    rig.claim("data", storage_class)
    volume = rig.bound("data")
    rig.delete_claim("data")
    rig.wait_event(volume.name, "VolumeInUse")
    reference = {"namespace": rig.namespace, "name": "rescue", "uid": None, "resourceVersion": None}
    rig.api.patch(PersistentVolume, volume.name, {"spec": {"claimRef": reference}})
    seen: list[Any] = []
    provisioner.on_delete = lambda found: seen.append(found.spec.claim_ref)
    rig.claim("rescue", storage_class, volumeName=volume.name)
    assert rig.bound("rescue").name == volume.name
    assert all(reference.name == "data" for reference in seen)
    assert volume.name in provisioner.assets() or seen


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
        provisioner.on_provision = script(Reschedule("full"))
        rig.claim("data", waiting_class, annotations={ANN_SELECTED_NODE: node})
        until(lambda: unselected(rig), "the node is taken back")
    else:
        rig.claim("data", rig.storage_class())
        volume = rig.bound("data")
        rule = proxy.on("patch", resource, times=1).fail(409)
        rig.delete_claim("data")
        until(lambda: gone(rig, PersistentVolume, volume.name), "the finalizer is removed")
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
