"""The controller under faults: a real control plane, and between it and us a proxy that misbehaves.

``rig.api`` speaks to the server itself, so that what a test does and sees has no faults.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from external_storage import PersistentVolume, PersistentVolumeClaim, ProvisioningFailed
from external_storage.kube.errors import NotFound
from external_storage.kube.names import ANN_PROVISIONED_BY
from external_storage.testing import FaultProxy
from external_storage.workqueue import Backoff

CLAIMS, VOLUMES = "persistentvolumeclaims", "persistentvolumes"
LIMIT_S = 60.0
Until = Callable[..., Any]


@pytest.fixture
def rig(proxy: FaultProxy, rig: Any) -> Any:
    """As always, but its provisioners reach the server through the proxy."""
    rig.plane = SimpleNamespace(kubeconfig=proxy.kubeconfig())
    return rig


@pytest.fixture
def quick_relist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The back-off of informers is for outages, not for a test of a hundred of them."""
    quick = Backoff(start_s=0.05, max_s=0.1, jitter=0.0)
    monkeypatch.setattr("external_storage.informer.reflector.BACKOFF", quick)


def statuses(proxy: FaultProxy, verb: str, resource: str) -> list[int]:
    """What the client was answered, in the order in which it asked."""
    return [r.status for r in proxy.requests if (r.verb, r.resource) == (verb, resource)]


def metric(rig: Any, name: str, **labels: str) -> float:
    value = rig.provisioner.context.metrics.registry.get_sample_value(name, labels)
    return float(value or 0.0)


def assert_one_volume(rig: Any) -> PersistentVolume:
    """The claim ``data`` was served once, and holds the only volume."""
    volume: PersistentVolume = rig.bound("data")
    assert rig.provisioner.provisioned == ["data"]
    assert [found.name for found in rig.volumes()] == [volume.name]
    assert rig.provisioner.assets() == [volume.name]
    return volume


# -- saving the volume


def test_a_save_answered_500_but_carried_out_is_adopted(rig: Any, proxy: FaultProxy) -> None:
    rig.start()
    proxy.on("create", VOLUMES).fail_after(500)
    rig.claim("data", rig.storage_class())
    proxy.wait_for(lambda r: r.verb == "get" and r.resource == VOLUMES and r.status == 200)
    assert_one_volume(rig)
    assert statuses(proxy, "create", VOLUMES) == [500, 409]


# Once, libcurl may itself ask again; twice, we do.
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("half", [False, True])
def test_a_save_whose_answer_is_cut_off_is_adopted(
    rig: Any, proxy: FaultProxy, times: int, half: bool
) -> None:
    rig.start()
    rule = proxy.on("create", VOLUMES, times=times).cut(half=half)
    rig.claim("data", rig.storage_class())
    proxy.wait_for(lambda r: r.verb == "get" and r.resource == VOLUMES and r.status == 200)
    assert_one_volume(rig)
    assert rule.applied == times
    asked = [r for r in proxy.requests if (r.verb, r.resource) == ("create", VOLUMES)]
    assert [r.server_status for r in asked] == [201] + [409] * times


def test_a_conflict_is_checked_with_the_server_and_not_taken_for_success(
    rig: Any, proxy: FaultProxy
) -> None:
    rig.start()
    proxy.on("create", VOLUMES).fail(409)
    rig.claim("data", rig.storage_class())
    volume = assert_one_volume(rig)
    assert statuses(proxy, "create", VOLUMES) == [409, 201]
    checks = [r for r in proxy.requests if (r.verb, r.resource) == ("get", VOLUMES)]
    assert [(r.name, r.status) for r in checks] == [(volume.name, 404)]


def test_a_server_that_is_busy_is_asked_again_when_it_says(rig: Any, proxy: FaultProxy) -> None:
    provisioner = rig.start()
    proxy.on("create", VOLUMES, times=4).fail(429, retry_after_s=1)
    storage_class = rig.storage_class()
    for number in range(3):
        rig.claim(f"data-{number}", storage_class)
    for number in range(3):
        rig.bound(f"data-{number}")
    assert sorted(provisioner.provisioned) == ["data-0", "data-1", "data-2"]
    assert sorted(statuses(proxy, "create", VOLUMES)) == [201] * 3 + [429] * 4


# -- watches that lag


def _hold_provision(rig: Any, release: threading.Event) -> None:
    """Make the claim ``data`` and return when the provisioner is at work on it."""
    entered = threading.Event()

    def hold(_request: object) -> None:
        entered.set()
        assert release.wait(LIMIT_S)

    rig.provisioner.on_provision = hold
    rig.claim("data", rig.storage_class())
    assert entered.wait(LIMIT_S)
    rig.provisioner.on_provision = lambda _: None


def test_a_lagging_claim_watch_never_makes_a_second_volume(
    rig: Any, proxy: FaultProxy, until: Until, release: threading.Event
) -> None:
    """Bound and deleted, its volume come and gone: to us the claim still waits for a volume."""
    provisioner = rig.start()
    work = threading.Event()
    _hold_provision(rig, work)
    proxy.lag(CLAIMS, release)
    work.set()
    volume = rig.bound("data")
    rig.delete_claim("data")
    until(lambda: _is_gone(rig, "data"), "the claim is gone")
    _remove(rig, volume, until)
    # The volume's end makes us look at the claim once more, and ask the server about it.
    proxy.wait_for(lambda r: r.verb == "get" and r.resource == CLAIMS and r.status == 404)
    assert proxy.held(CLAIMS) > 0
    release.set()
    rig.claim("later", rig.namespace)
    rig.bound("later")
    assert provisioner.provisioned == ["data", "later"]
    assert len(rig.volumes()) == 1


def _is_gone(rig: Any, name: str) -> bool:
    try:
        rig.get_claim(name)
    except NotFound:
        return True
    return False


def _remove(rig: Any, volume: PersistentVolume, until: Until) -> None:
    """As an admin would who has lost patience; the controller manager takes its own finalizer."""
    rig.api.patch(PersistentVolume, volume.name, {"metadata": {"finalizers": None}})
    rig.api.delete(PersistentVolume, volume.name, uid=volume.uid)
    until(lambda: volume.name not in _names(rig), "the volume is gone")


@pytest.mark.parametrize(
    "rescue",
    [
        {"spec": {"persistentVolumeReclaimPolicy": "Retain"}},
        {"spec": {"claimRef": None}},
        {"metadata": {"annotations": {ANN_PROVISIONED_BY: "example.com/other"}}},
    ],
    ids=["retain", "no claim", "another provisioner"],
)
def test_data_that_an_admin_has_just_saved_is_not_deleted(
    rig: Any,
    proxy: FaultProxy,
    until: Until,
    release: threading.Event,
    caplog: pytest.LogCaptureFixture,
    rescue: dict[str, Any],
) -> None:
    """To us the volume is still Released with policy Delete: the watch lags behind the rescue."""
    caplog.set_level("INFO")
    provisioner = rig.start()
    rig.claim("data", rig.storage_class())
    volume = rig.bound("data")

    def fail(_volume: object) -> None:
        raise ProvisioningFailed("not yet")

    provisioner.on_delete = fail
    rig.delete_claim("data")
    until(lambda: provisioner.deleted, "a first try")
    proxy.lag(VOLUMES, release)
    rig.api.patch(PersistentVolume, volume.name, rescue)
    provisioner.on_delete = lambda _: None
    until(lambda: "volume kept at a second look" in caplog.messages, "a second look")
    assert proxy.held(VOLUMES) > 0
    assert provisioner.assets() == [volume.name]
    assert rig.api.get(PersistentVolume, volume.name).metadata.deletion_timestamp is None


def test_a_lagging_volume_watch_makes_no_second_delete(
    rig: Any, proxy: FaultProxy, until: Until, release: threading.Event
) -> None:
    """The volume is gone; to us it is still Released when its claim's end makes us look again."""
    provisioner = rig.start()
    storage_class = rig.storage_class()
    rig.claim("data", storage_class)
    volume = rig.bound("data")
    claims_again, work = threading.Event(), threading.Event()
    try:
        _delete_with_lagging_claims(rig, proxy, claims_again, work)
        proxy.lag(VOLUMES, release)
        work.set()
        until(lambda: volume.name not in _names(rig), "the volume is gone")
        until(lambda: proxy.held(VOLUMES) > 0, "we are not told that it is gone")
    finally:
        work.set()
        claims_again.set()
    # Behind the end of the first claim on its watch: when it is served, that end has been seen.
    rig.claim("later", storage_class)
    later = rig.bound("later")
    release.set()
    until(lambda: proxy.held() == 0, "all is told")
    rig.delete_claim("later")
    until(lambda: later.name not in _names(rig), "the later volume is gone")
    assert provisioner.deleted == [volume.name, later.name]


def _names(rig: Any) -> list[str]:
    return [volume.name for volume in rig.volumes()]


def _delete_with_lagging_claims(
    rig: Any, proxy: FaultProxy, claims_again: threading.Event, work: threading.Event
) -> None:
    """Delete the claim ``data``; return when the provisioner is deleting its volume, held by
    ``work``, and the very end of the claim is held back until ``claims_again``."""
    entered = threading.Event()

    def hold(_volume: object) -> None:
        entered.set()
        assert work.wait(LIMIT_S)

    rig.provisioner.on_delete = hold
    _set_claim_finalizers(rig, ["example.com/hold"])
    rig.delete_claim("data")
    # A claim made after that is served: then we know that this one is on its way out.
    rig.claim("marker", rig.namespace)
    rig.bound("marker")
    proxy.lag(CLAIMS, claims_again)
    _set_claim_finalizers(rig, None)
    assert entered.wait(LIMIT_S)
    rig.provisioner.on_delete = lambda _: None


def _set_claim_finalizers(rig: Any, finalizers: list[str] | None) -> None:
    patch = {"metadata": {"finalizers": finalizers}}
    rig.api.patch(PersistentVolumeClaim, "data", patch, namespace=rig.namespace)


# -- watches that are cut


def _make_claims_and_cut(rig: Any, proxy: FaultProxy, count: int, *, until: Until) -> None:
    """Make claims one by one, each followed by the end of every watch; wait for all."""
    provisioner = rig.start()
    storage_class = rig.storage_class()
    for number in range(count):
        rig.claim(f"data-{number}", storage_class)
        until(lambda: len(provisioner.provisioned) > number, "the claim is seen")  # noqa: B023
        until(lambda: proxy.watching(CLAIMS), "claims are watched")
        assert proxy.cut_watches() >= 1
    for number in range(count):
        rig.bound(f"data-{number}")
    assert sorted(provisioner.provisioned) == sorted(f"data-{n}" for n in range(count))
    assert len(rig.volumes()) == count


def test_watches_cut_a_hundred_times_miss_nothing_and_cost_no_list(
    rig: Any, proxy: FaultProxy, until: Until, quick_relist: None
) -> None:
    _make_claims_and_cut(rig, proxy, 100, until=until)
    assert len(statuses(proxy, "watch", CLAIMS)) >= 100
    for resource in (CLAIMS, VOLUMES, "storageclasses"):
        assert statuses(proxy, "list", resource) == [200]


@pytest.mark.parametrize("as_status", [False, True])
def test_410_on_every_second_watch_misses_nothing(
    rig: Any, proxy: FaultProxy, until: Until, quick_relist: None, as_status: bool
) -> None:
    proxy.gone_on_watch(CLAIMS, as_status=as_status)
    _make_claims_and_cut(rig, proxy, 10, until=until)
    gone = sum(r.fault == "gone" for r in proxy.requests)
    assert gone >= 9
    # One at the start and one for each: what has expired is listed again, once.
    assert gone <= len(statuses(proxy, "list", CLAIMS)) <= gone + 1


def test_half_an_answer_to_a_list_is_listed_again(rig: Any, proxy: FaultProxy) -> None:
    storage_class = rig.storage_class()
    rig.claim("data", storage_class)
    rules = [proxy.on("list", kind).cut(half=True) for kind in (CLAIMS, VOLUMES)]
    rig.start()
    assert_one_volume(rig)
    assert [rule.applied for rule in rules] == [1, 1]
    assert len(statuses(proxy, "list", CLAIMS)) == 2


def test_survives_a_server_that_cannot_be_reached(
    rig: Any, proxy: FaultProxy, quick_relist: None
) -> None:
    rig.start()
    work = threading.Event()
    _hold_provision(rig, work)
    proxy.down()
    rig.claim("meanwhile", rig.namespace)
    work.set()
    proxy.up()
    rig.bound("meanwhile")
    rig.bound("data")
    assert rig.provisioner.provisioned == ["data", "meanwhile"]


# -- deleting


def test_a_finalizer_that_cannot_be_removed_is_tried_again(
    rig: Any, proxy: FaultProxy, until: Until
) -> None:
    provisioner = rig.start()
    rig.claim("data", rig.storage_class())
    volume = rig.bound("data")
    rule = proxy.on("patch", VOLUMES, name=volume.name, times=3).fail(500)
    rig.delete_claim("data")
    until(lambda: not rig.volumes(), "the volume is gone")
    assert rule.applied == 3
    assert provisioner.assets() == []
    assert set(provisioner.deleted) == {volume.name}


def test_a_volume_that_is_gone_already_counts_as_deleted(
    rig: Any, proxy: FaultProxy, until: Until
) -> None:
    provisioner = rig.start()
    rig.claim("data", rig.storage_class())
    volume = rig.bound("data")
    provisioner.on_delete = lambda volume: _remove(rig, volume, until)
    rig.delete_claim("data")
    proxy.wait_for(lambda r: r.verb == "delete" and r.resource == VOLUMES and r.done)
    assert statuses(proxy, "delete", VOLUMES) == [404]
    rig.claim("later", rig.namespace)
    rig.bound("later")
    assert provisioner.deleted == [volume.name]
    labels = {"class": rig.namespace}
    assert metric(rig, "controller_persistentvolume_delete_failed_total", **labels) == 0
    assert not rig.events(volume.name, "VolumeFailedDelete")


def test_a_delete_whose_answer_is_cut_off_ends_well(
    rig: Any, proxy: FaultProxy, until: Until
) -> None:
    provisioner = rig.start()
    rig.claim("data", rig.storage_class())
    rig.bound("data")
    rule = proxy.on("delete", VOLUMES, times=2).cut()
    rig.delete_claim("data")
    until(lambda: not rig.volumes(), "the volume is gone")
    assert provisioner.assets() == []
    assert rule.applied >= 1


# -- events


@pytest.mark.parametrize("status", [403, 500])
def test_events_that_cannot_be_written_cost_nothing_and_are_counted(
    rig: Any, proxy: FaultProxy, until: Until, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    quick = Backoff(start_s=0.01, max_s=0.01)
    monkeypatch.setattr("external_storage.events._BACKOFF", quick)
    proxy.on("create", "events", times=None).fail(status)
    rig.start()
    rig.claim("data", rig.storage_class())
    assert_one_volume(rig)
    until(lambda: metric(rig, "external_storage_events_dropped_total") >= 2, "drops are counted")
    assert not rig.events("data")
