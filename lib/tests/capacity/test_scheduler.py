"""What the real kube-scheduler makes of what is published, and who keeps it up to date."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from external_storage import AvailableCapacity, PersistentVolume, StorageClass
from external_storage.claims import selected_node
from external_storage.kube.names import BINDING_WAIT, LABEL_HOSTNAME
from external_storage.kube.types import CSIStorageCapacity, KubeObject, KubeStruct, Node
from external_storage.testing import ControlPlane

GIB = 2**30
LONG = "1h"
"""A poll interval that no test waits for."""
Until = Callable[..., Any]


class PodCondition(KubeStruct, frozen=True):
    type: str = ""
    status: str = ""
    message: str = ""


class PodSpec(KubeStruct, frozen=True):
    node_name: str = ""


class PodStatus(KubeStruct, frozen=True):
    conditions: tuple[PodCondition, ...] = ()


class Pod(KubeObject, frozen=True):
    API_VERSION: ClassVar[str] = "v1"
    KIND: ClassVar[str] = "Pod"
    RESOURCE: ClassVar[str] = "pods"
    NAMESPACED: ClassVar[bool] = True

    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


@pytest.fixture
def schedule(control_plane: ControlPlane) -> Iterator[Callable[[], None]]:
    """Starts the scheduler. Called when all is set up: it then knows all of it before it schedules
    the first pod, and which node it chooses does not hang on which news reached it first."""
    yield control_plane.start_scheduler
    control_plane.stop_scheduler()


def test_the_scheduler_runs_only_while_it_is_asked_for(control_plane: ControlPlane) -> None:
    before = control_plane.pids
    assert "kube-scheduler" not in before
    control_plane.start_scheduler()
    started = control_plane.pids
    control_plane.start_scheduler()
    assert control_plane.pids == started
    assert control_plane.ended() is None
    control_plane.stop_scheduler()
    control_plane.stop_scheduler()
    assert control_plane.pids == before
    assert control_plane.ended() is None


def add_node(rig: Any, name: str) -> str:
    """A node that pods can be put on, as far as the scheduler sees."""
    made: str = rig.node(name, bed=rig.namespace)
    sizes = {"cpu": "4", "memory": "8Gi", "pods": "110"}
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady"}
    status = {"status": {"capacity": sizes, "allocatable": sizes, "conditions": [ready]}}
    rig.api.patch(Node, made, status, subresource="status")
    return made


def add_pod(rig: Any, name: str, *, claim: str, prefers: str = "") -> None:
    """A pod with the claim, for the nodes of the test; of those it ``prefers`` one."""
    is_it = {"key": LABEL_HOSTNAME, "operator": "In", "values": [prefers]}
    weighed = [{"weight": 100, "preference": {"matchExpressions": [is_it]}}] if prefers else []
    mount = {"name": "data", "mountPath": "/data"}
    body = {
        "metadata": {"name": name},
        "spec": {
            "nodeSelector": {"bed": rig.namespace},
            "affinity": {
                "nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": weighed}
            },
            # No kubelet renews the nodes' heartbeat: after a while they are tainted.
            "tolerations": [{"operator": "Exists"}],
            "automountServiceAccountToken": False,
            # Nor would one confirm the pod's end.
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "main", "image": "none", "volumeMounts": [mount]}],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}],
        },
    }
    made = rig.api.create(Pod, body, namespace=rig.namespace)
    rig.stack.callback(rig.api.delete, Pod, name, uid=made.uid, namespace=rig.namespace)


def get_pod(rig: Any, name: str) -> Pod:
    pod: Pod = rig.api.get(Pod, name, namespace=rig.namespace)
    return pod


def why_unscheduled(rig: Any, name: str) -> str:
    """What the pod's condition says, once the scheduler has found no node."""
    for condition in get_pod(rig, name).status.conditions:
        if condition.type == "PodScheduled" and condition.status == "False":
            return condition.message
    return ""


def start(rig: Any, left: dict[str, int], **settings: str) -> Any:
    """The provisioner, with so many GiB left on each node, read at each round."""

    def available_capacity(_self: Any, _class: Any) -> list[AvailableCapacity]:
        return [
            AvailableCapacity(capacity=gib * GIB, topology={LABEL_HOSTNAME: node})
            for node, gib in left.items()
        ]

    rig.methods["available_capacity"] = available_capacity
    return rig.start(capacity_poll_interval=LONG, **settings)


def published(rig: Any) -> dict[str, str | None]:
    """Capacity by node."""
    found = rig.api.list_all(CSIStorageCapacity, namespace=rig.namespace)
    return {item.node_topology.match_labels[LABEL_HOSTNAME]: item.capacity for item in found}


def ask(gib: int) -> dict[str, Any]:
    return {"resources": {"requests": {"storage": f"{gib}Gi"}}}


def test_of_two_nodes_the_full_one_is_not_chosen(
    bed: Any, until: Until, schedule: Callable[[], None]
) -> None:
    rig = bed.rig
    full, roomy = add_node(rig, "-full"), add_node(rig, "-roomy")
    bed.driver()
    storage_class = rig.storage_class(volumeBindingMode=BINDING_WAIT)
    provisioner = start(rig, {full: 1, roomy: 10})
    until(lambda: published(rig) == {full: "1Gi", roomy: "10Gi"}, "what is left is published")
    rig.claim("large", storage_class, **ask(5))
    rig.claim("small", storage_class, **ask(1))
    schedule()
    # The pods would rather be on the full node: the small one shows that they could.
    for size in ("large", "small"):
        add_pod(rig, size, claim=size, prefers=full)
        rig.bound(size)
        until(lambda size=size: get_pod(rig, size).spec.node_name, f"pod {size} has a node")
    chosen = {request.claim.name: request.selected_node for request in provisioner.requests}
    assert chosen == {"large": roomy, "small": full}
    assert selected_node(rig.get_claim("large")) == roomy
    assert get_pod(rig, "large").spec.node_name == roomy
    assert get_pod(rig, "small").spec.node_name == full


def test_without_a_driver_that_says_so_the_full_node_is_chosen(
    bed: Any, until: Until, schedule: Callable[[], None]
) -> None:
    """What the test above would see if nobody read what is published."""
    rig = bed.rig
    full, roomy = add_node(rig, "-full"), add_node(rig, "-roomy")
    bed.driver(reads_capacity=False)
    storage_class = rig.storage_class(volumeBindingMode=BINDING_WAIT)
    start(rig, {full: 1, roomy: 10})
    rig.claim("large", storage_class, **ask(5))
    schedule()
    add_pod(rig, "large", claim="large", prefers=full)
    rig.bound("large")
    assert selected_node(rig.get_claim("large")) == full
    assert published(rig) == {}


def test_a_claim_for_which_no_node_has_room_waits_until_one_has(
    bed: Any, until: Until, schedule: Callable[[], None]
) -> None:
    rig = bed.rig
    full = add_node(rig, "-full")
    bed.driver()
    storage_class = rig.storage_class(volumeBindingMode=BINDING_WAIT)
    left = {full: 1}
    provisioner = start(rig, left)
    until(lambda: published(rig) == {full: "1Gi"}, "what is left is published")
    rig.claim("large", storage_class, **ask(5))
    schedule()
    add_pod(rig, "large", claim="large")
    why = until(lambda: why_unscheduled(rig, "large"), "the scheduler says why there is no node")
    assert "did not have enough free storage" in why
    assert selected_node(rig.get_claim("large")) is None
    assert provisioner.provisioned == []
    # The back end grows, and another volume is a reason to look.
    left[full] = 20
    other = rig.storage_class("-now")
    rig.claim("another", other)
    rig.bound("large")
    assert published(rig) == {full: "20Gi"}


def test_what_is_left_follows_our_work_and_stays_when_we_end(bed: Any, until: Until) -> None:
    rig = bed.rig
    bed.driver()
    wait = rig.storage_class("-wait", volumeBindingMode=BINDING_WAIT)
    left = {"n1": 10}
    provisioner = start(rig, left)
    until(lambda: published(rig) == {"n1": "10Gi"}, "what is left is published")
    read = provisioner.context.metrics.registry.get_sample_value
    assert read("external_storage_published_capacities") == 1

    def use(_request: Any) -> None:
        left["n1"] -= 1

    def free(_volume: PersistentVolume) -> None:
        left["n1"] += 1

    provisioner.on_provision, provisioner.on_delete = use, free
    rig.claim("data", rig.storage_class())
    rig.bound("data")
    until(lambda: published(rig) == {"n1": "9Gi"}, "the new volume counts")
    rig.delete_claim("data")
    until(lambda: published(rig) == {"n1": "10Gi"}, "the deleted one does not")

    assert rig.manager.stop()
    before = rig.api.list_all(CSIStorageCapacity, namespace=rig.namespace)
    assert published(rig) == {"n1": "10Gi"}
    second = start(rig, left)
    read = second.context.metrics.registry.get_sample_value
    until(lambda: read("external_storage_published_capacities") == 1, "it looks after a start")
    assert rig.api.list_all(CSIStorageCapacity, namespace=rig.namespace) == before
    rig.drop(StorageClass, wait)
    until(lambda: published(rig) == {}, "the class is gone, and so is what was left for it")


def test_who_has_no_available_capacity_asks_the_api_server_for_nothing(
    bed: Any, until: Until
) -> None:
    rig = bed.rig
    bed.driver()
    rig.storage_class("-wait", volumeBindingMode=BINDING_WAIT)
    provisioner = rig.start(capacity_poll_interval="1")
    rig.claim("data", rig.storage_class())
    rig.bound("data")
    metrics = provisioner.context.metrics.render().decode()
    assert 'resource="persistentvolumes"' in metrics
    assert "csi" not in metrics
    assert "published" not in metrics
    assert not [t for t in threading.enumerate() if t.name == "capacity"]
