"""A fault at every call to the storage host: in the end there is one volume, or none."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from tests.targetd_server import MIB, PASSWORD, HangUp, TargetdServer

from external_storage import (
    Context,
    Deadline,
    Infeasible,
    PersistentVolume,
    ProvisionedVolume,
    ProvisionerError,
    ProvisioningFailed,
    ProvisioningInBackground,
    ProvisionRequest,
    Unchanged,
)
from external_storage.kube.client import Client
from external_storage.kube.errors import KubeError
from external_storage.kube.types import Secret
from external_storage.metrics import Metrics
from external_storage.testing import builders
from iscsi_targetd_provisioner.provisioner import IscsiTargetdProvisioner
from iscsi_targetd_provisioner.settings import IscsiTargetdParameters, IscsiTargetdSettings
from iscsi_targetd_provisioner.targetd import Targetd

HOW = ("before", "after", "lost")
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


@pytest.fixture
def provisioner(targetd: TargetdServer) -> Iterator[IscsiTargetdProvisioner]:
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


def faults_at_every_call(
    targetd: TargetdServer, call: Callable[[], Any], how: str
) -> Iterator[Any]:
    """Make the call with the first request failing, then the second, until none fails any more;
    gives the error of each time."""
    for number in range(1, 100):
        first = len(targetd.calls)
        targetd.fail_once(number, how)
        error: ProvisionerError | None = None
        try:
            call()
        except ProvisionerError as caught:
            error = caught
        reached = len(targetd.calls) - first >= number
        targetd.fault = None
        if not reached:
            return
        yield error
    pytest.fail("a call has no end")


@pytest.mark.parametrize("how", HOW)
def test_a_fault_at_any_request_of_a_provisioning_is_made_good(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer, how: str
) -> None:
    points = 0
    for error in faults_at_every_call(targetd, lambda: provisioner.provision(request()), how):
        points += 1
        if isinstance(error, ProvisioningFailed):
            assert is_gone(targetd), "what has failed for good has left something"
        made = persist(lambda: provisioner.provision(request()))
        assert is_there_once(targetd)
        provisioner.delete(saved(made))
        assert is_gone(targetd)
    assert points >= 7
    assert is_there_once(targetd)


@pytest.mark.parametrize("how", HOW)
def test_a_fault_after_which_the_claim_goes_leaves_nothing(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer, how: str
) -> None:
    """The library asks on until an end is known, and then deletes what was made."""
    for error in faults_at_every_call(targetd, lambda: provisioner.provision(request()), how):
        while isinstance(error, ProvisioningInBackground):
            try:
                provisioner.delete(saved(provisioner.provision(request())))
                error = None
            except ProvisionerError as again:
                error = again
        if error is None and not is_gone(targetd):
            provisioner.delete(saved(provisioner.provision(request())))
        assert error is None or isinstance(error, (ProvisioningFailed, Unchanged))
        assert is_gone(targetd)
    provisioner.delete(saved(provisioner.provision(request())))


@pytest.mark.parametrize("how", HOW)
def test_a_fault_at_any_request_of_a_deletion_is_made_good(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer, how: str
) -> None:
    volume = saved(persist(lambda: provisioner.provision(request())))

    def delete() -> None:
        backend = provisioner._fleet.servers["default"].backend
        deadline = Deadline(time.monotonic() + LOST_S)
        backend.unexport("vg-targetd", volume.name, deadline=deadline)
        backend.destroy("vg-targetd", volume.name, deadline=deadline)

    for _ in faults_at_every_call(targetd, delete, how):
        persist(lambda: provisioner.delete(volume))
        assert is_gone(targetd)
        persist(lambda: provisioner.provision(request()))
    assert is_gone(targetd)


@pytest.mark.parametrize("how", HOW)
def test_a_fault_at_any_request_of_an_expansion_is_made_good(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer, how: str
) -> None:
    volume = saved(persist(lambda: provisioner.provision(request())))
    wanted = 8 * MIB

    def grow() -> None:
        backend = provisioner._fleet.servers["default"].backend
        deadline = Deadline(time.monotonic() + LOST_S)
        backend.resize("vg-targetd", volume.name, wanted + 4 * MIB, deadline=deadline)

    for _ in faults_at_every_call(targetd, grow, how):
        wanted += 4 * MIB
        grown = persist(functools.partial(provisioner.expand, volume, wanted))
        (lv,) = targetd.model.volumes.values()
        assert (grown.capacity, lv.size, grown.node_step) == (wanted, wanted, True)


def test_a_volume_that_is_not_what_it_says_is_left_alone(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer
) -> None:
    made = persist(lambda: provisioner.provision(request()))
    volume = saved(made)
    forged = msgspec.structs.replace(
        volume, metadata=msgspec.structs.replace(volume.metadata, name="pvc-other")
    )
    with pytest.raises(ProvisioningFailed, match="volume_name says"):
        provisioner.delete(forged)
    bare = msgspec.structs.replace(
        volume, metadata=msgspec.structs.replace(volume.metadata, annotations={})
    )
    with pytest.raises(ProvisioningFailed, match="it is left alone"):
        provisioner.delete(bare)
    assert is_there_once(targetd)


def test_a_volume_of_the_original_is_deleted_without_its_initiators(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer
) -> None:
    volume = saved(persist(lambda: provisioner.provision(request())))
    notes = {"volume_name": volume.name, "pool": "vg-targetd", "initiators": "iqn.2000-01.a.b:x"}
    original = msgspec.structs.replace(
        volume, metadata=msgspec.structs.replace(volume.metadata, annotations=notes)
    )
    provisioner.delete(original)
    assert is_gone(targetd)
    provisioner.delete(original)


WITH_CHAP = {"chapAuthSession": "true", "chapSecretName": "chap"}


def test_half_of_a_set_up_is_refused_before_the_host_is_asked_to_make_anything(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer
) -> None:
    with pytest.raises(ProvisioningFailed, match=r"Secret default/chap .* does not exist"):
        provisioner.provision(request(**WITH_CHAP))
    assert set(targetd.calls) <= {"pool_list", "vol_list"}


class Api:
    """The API server as far as a call asks it: one Secret, that can be taken away."""

    def __init__(self) -> None:
        self.fault: KubeError | None = None
        self.there = True

    def find(self, kind: type, *_args: object, **_kwargs: object) -> Any:
        if kind is not Secret:
            return None
        if self.fault is not None:
            raise self.fault
        keys = ("node.session.auth.username", "node.session.auth.password")
        data = dict.fromkeys(keys, "c2VjcmV0IG9mIHRlc3Q=")
        return SimpleNamespace(data=data) if self.there else None


@pytest.fixture
def api(provisioner: IscsiTargetdProvisioner) -> Api:
    made = Api()
    provisioner.context = dataclasses.replace(provisioner.context, client=cast(Client, made))
    credentials = dataclasses.replace(provisioner._credentials, client=cast(Client, made))
    provisioner._credentials = credentials
    return made


def lose_the_answer_to_the_export(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer, **parameters: str
) -> None:
    def lost(method: str, do: Callable[[], Any]) -> Any:
        done = do()
        if method == "export_create":
            raise HangUp
        return done

    with targetd.faulty(lost), pytest.raises(ProvisioningInBackground):
        provisioner.provision(request(**parameters))
    assert targetd.model.volumes


def test_a_secret_that_goes_before_the_second_try_leaves_nothing_of_the_first(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer, api: Api
) -> None:
    lose_the_answer_to_the_export(provisioner, targetd, **WITH_CHAP)
    api.there = False
    with pytest.raises(ProvisioningFailed, match="does not exist"):
        provisioner.provision(request(**WITH_CHAP))
    assert is_gone(targetd)


def test_an_api_server_that_does_not_answer_is_no_end_of_a_try(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer, api: Api
) -> None:
    lose_the_answer_to_the_export(provisioner, targetd, **WITH_CHAP)
    api.fault = KubeError("the API server is away")
    with pytest.raises(Unchanged, match="the API server is away"):
        provisioner.provision(request(**WITH_CHAP))
    assert not is_gone(targetd)
    api.fault = None
    provisioner.provision(request(**WITH_CHAP))
    assert is_there_once(targetd)


def test_a_pool_that_has_filled_up_since_leaves_nothing_of_the_first_try(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer
) -> None:
    lose_the_answer_to_the_export(provisioner, targetd)
    with pytest.raises(Infeasible, match="is not"):
        # The class has been made again, with what cannot be.
        provisioner.provision(request(thin="true"))
    with pytest.raises(Infeasible, match="has no iqn"):
        provisioner.provision(request(iqn=""))
    assert is_gone(targetd)


def test_when_it_cannot_be_told_whether_anything_is_left_the_try_goes_on(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer, api: Api
) -> None:
    lose_the_answer_to_the_export(provisioner, targetd, **WITH_CHAP)
    api.there = False
    targetd.fail_once(1, "after")
    with pytest.raises(ProvisioningInBackground, match=r"does not exist.* is not known"):
        provisioner.provision(request(**WITH_CHAP))
    targetd.fault = None
    with pytest.raises(ProvisioningFailed, match="does not exist"):
        provisioner.provision(request(**WITH_CHAP))
    assert is_gone(targetd)


def test_what_nobody_foresaw_is_undone_too(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(provisioner._fleet.servers["default"].backend, "export", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        provisioner.provision(request())
    assert is_gone(targetd)


def test_a_thick_volume_in_the_place_of_a_thin_one_is_found_after_a_lost_answer(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer
) -> None:
    targetd.model.thin_fails = True

    def lost(method: str, do: Callable[[], Any]) -> Any:
        done = do()
        if method == "vol_create":
            raise HangUp
        return done

    with targetd.faulty(lost), pytest.raises(ProvisioningInBackground):
        provisioner.provision(request(volumeGroup="fast/thin"))
    assert [lv.pool for lv in targetd.model.volumes.values()] == [""]
    with pytest.raises(Infeasible, match="beside it; it was removed"):
        provisioner.provision(request(volumeGroup="fast/thin"))
    assert is_gone(targetd)
    # Or the claim cannot be served any more: it is looked for all the same.
    with targetd.faulty(lost), pytest.raises(ProvisioningInBackground):
        provisioner.provision(request(volumeGroup="fast/thin"))
    with pytest.raises(Infeasible):
        provisioner.provision(request(volumeGroup="fast/thin", iqn=""))
    assert is_gone(targetd)


def test_only_configured_pools_are_used_also_when_the_class_names_another(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer
) -> None:
    backend = provisioner._fleet.servers["default"].backend
    assert isinstance(backend, Targetd)
    backend._pools = ("fast/thin",)
    with pytest.raises(Infeasible, match="pool vg-targetd is not one that default may use"):
        provisioner.provision(request())
    deadline = Deadline(time.monotonic() + 60)
    for call in (backend.create, backend.resize):
        with pytest.raises(ProvisioningFailed, match="pool vg-targetd is not configured"):
            call("vg-targetd", "pvc-1", 8 * MIB, deadline=deadline)
    assert is_gone(targetd)


def test_a_volume_on_which_xfs_cannot_be_made_is_refused(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer
) -> None:
    with pytest.raises(Infeasible, match="xfs cannot be made on 8Mi: ask for 300Mi"):
        provisioner.provision(request(fsType=""))
    assert is_gone(targetd)


def test_that_chap_is_not_enforced_is_an_event_of_the_class(
    provisioner: IscsiTargetdProvisioner, api: Api
) -> None:
    assert api.there
    told: list[str] = []
    events = SimpleNamespace(warning=lambda _about, reason, _text: told.append(reason))
    provisioner.context = dataclasses.replace(provisioner.context, events=cast(Any, events))
    persist(lambda: provisioner.provision(request(**WITH_CHAP)))
    assert told == ["ChapNotEnforced"]


def test_a_volume_that_has_filled_its_pool_is_found_there(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer
) -> None:
    targetd.model.pools = {"vg-targetd": 8 * MIB}
    lose_the_answer_to_the_export(provisioner, targetd, volumeGroup="")
    provisioner.provision(request(volumeGroup=""))
    assert is_there_once(targetd)


def test_a_thick_volume_is_not_taken_for_the_thin_one_that_was_meant(
    provisioner: IscsiTargetdProvisioner, targetd: TargetdServer
) -> None:
    targetd.model.pools = {"fast/thin": 64 * MIB, "slow/thin": 32 * MIB}
    targetd.model.thin_fails = True

    def lost(method: str, do: Callable[[], Any]) -> Any:
        done = do()
        if method == "vol_create":
            raise HangUp
        return done

    with targetd.faulty(lost), pytest.raises(ProvisioningInBackground):
        provisioner.provision(request(volumeGroup="", thin="true"))
    with pytest.raises(ProvisioningFailed, match="in fast, which is none of the class's pools"):
        provisioner.provision(request(volumeGroup="", thin="true"))
    assert is_gone(targetd)
