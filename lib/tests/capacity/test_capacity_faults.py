"""What can go wrong while publishing what is left: told once, tried again, nothing lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from external_storage import AvailableCapacity, StorageClass
from external_storage.errors import ProvisionerError
from external_storage.testing import ControlPlane, FaultProxy

GIB = 2**30
CAPACITIES = "csistoragecapacities"
Until = Callable[..., Any]
Warned = Callable[[], list[str]]
Left = list[AvailableCapacity] | None


def left(gib: int, **topology: str) -> AvailableCapacity:
    return AvailableCapacity(capacity=gib * GIB, topology=topology)


def grant(plane: ControlPlane, rig: Any, account: str) -> None:
    """The rights that publishing needs, and no others."""
    rules = [
        {"apiGroups": ["storage.k8s.io"], "resources": ["csidrivers"], "verbs": ["get"]},
        {
            "apiGroups": ["storage.k8s.io"],
            "resources": [CAPACITIES],
            "verbs": ["list", "create", "patch", "delete"],
        },
    ]
    rbac, namespace = "/apis/rbac.authorization.k8s.io/v1", rig.namespace
    subject = {"kind": "ServiceAccount", "name": account, "namespace": namespace}
    for kind, where, rule in (
        ("ClusterRole", "", rules[0]),
        ("Role", f"/namespaces/{namespace}", rules[1]),
    ):
        path = f"{rbac}{where}/{kind.lower()}s"
        role = {"metadata": {"name": namespace}, "rules": [rule]}
        plane.request("POST", path, role)
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": namespace}
        binding = {"metadata": {"name": namespace}, "subjects": [subject], "roleRef": reference}
        bindings = path.removesuffix("s") + "bindings"
        plane.request("POST", bindings, binding)
        if not where:
            rig.stack.callback(plane.request, "DELETE", f"{path}/{namespace}")
            rig.stack.callback(plane.request, "DELETE", f"{bindings}/{namespace}")


def test_an_authors_exception_keeps_what_was_published_and_is_told_once(
    bed: Any, warnings: Warned
) -> None:
    bed.driver()
    bed.add_class("broken")
    bed.add_class("sound")
    publisher, pools = bed.publisher()
    publisher.publish()
    before = bed.told()

    def ask(storage_class: StorageClass) -> Left:
        if storage_class.name == "broken":
            raise ProvisionerError("the disk is on fire")
        return [left(5)]

    pools.ask = ask
    for _ in range(3):
        assert not publisher.publish()
    assert before == [("broken", "1Gi"), ("sound", "1Gi")]
    assert bed.told() == [("broken", "1Gi"), ("sound", "5Gi")]
    assert warnings() == ["class broken"]
    pools.ask = lambda _: [left(-1)]
    assert not publisher.publish()
    assert warnings()[1:] == ["class broken", "class sound"]
    pools.ask = lambda _: [left(6)]
    assert publisher.publish()
    assert bed.told() == [("broken", "6Gi"), ("sound", "6Gi")]
    pools.ask = ask
    assert not publisher.publish()
    assert warnings()[3:] == ["class broken"], "told again after all was well"


def test_one_topology_that_is_refused_does_not_stop_the_others(bed: Any, warnings: Warned) -> None:
    bed.driver()
    bed.add_class("wait")
    publisher, pools = bed.publisher()
    pools.ask = lambda _: [left(1, zone="not a label"), left(2)]
    assert not publisher.publish()
    assert bed.told() == [("wait", "2Gi")]
    assert warnings() == ["class wait"]


def test_missing_rights_are_told_once_and_four_verbs_and_one_are_enough(
    bed: Any, control_plane: ControlPlane, until: Until, warnings: Warned
) -> None:
    rig, account = bed.rig, "publisher"
    accounts = f"/api/v1/namespaces/{rig.namespace}/serviceaccounts"
    control_plane.request("POST", accounts, {"metadata": {"name": account}})
    own = control_plane.service_account_kubeconfig(rig.namespace, account)
    bed.driver()
    wait = bed.add_class("wait")
    publisher, pools = bed.publisher(bed.client_of(own))
    for _ in range(3):
        assert not publisher.publish()
    assert warnings() == ["the API server"]
    grant(control_plane, rig, account)
    until(publisher.publish, "the rights are known")
    pools.ask = lambda _: [left(2)]
    assert publisher.publish()
    assert bed.told() == [("wait", "2Gi")]
    bed.classes.apply(wait, deleted=True)
    assert publisher.publish()
    assert bed.objects() == []


def test_survives_an_outage_of_the_api_server(
    bed: Any, proxy: FaultProxy, warnings: Warned
) -> None:
    bed.driver()
    bed.add_class("wait")
    publisher, pools = bed.publisher(bed.client_of(proxy.kubeconfig()))
    assert publisher.publish()
    proxy.down()
    pools.ask = lambda _: [left(2)]
    for _ in range(3):
        assert not publisher.publish()
    assert warnings() == ["the API server"]
    proxy.up()
    # Carried out, but answered with an error: found there by the next round.
    proxy.on("create", CAPACITIES).fail_after(500)
    bed.add_class("more")
    assert not publisher.publish()
    assert publisher.publish()
    assert bed.told() == [("more", "2Gi"), ("wait", "2Gi")]


def test_a_call_that_hangs_does_not_hold_up_the_end(bed: Any, until: Until) -> None:
    bed.driver()
    bed.add_class("wait")
    publisher, pools = bed.publisher(timeout_s=0.0)
    release, ended = threading.Event(), threading.Event()

    def ask(_: StorageClass) -> Left:
        release.wait()
        ended.set()
        return [left(1)]

    pools.ask = ask
    publisher.start()
    until(lambda: publisher._abandon(publisher._thread), "the call hangs")
    assert publisher.stop(timeout_s=60.0), "the thread is not waited for"
    assert not ended.is_set()
    release.set()
    publisher._thread.join(60.0)
    assert bed.objects() == [], "nothing is written after the end"
