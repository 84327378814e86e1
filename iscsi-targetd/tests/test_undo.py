"""What an earlier try has left, when the next one cannot even begin; what is refused before."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.on_targetd import is_gone, is_there_once, persist, request
from tests.targetd_server import MIB, HangUp, TargetdServer

from external_storage import (
    Deadline,
    Infeasible,
    ProvisioningFailed,
    ProvisioningInBackground,
    Unchanged,
)
from external_storage.kube.client import Client
from external_storage.kube.errors import KubeError
from external_storage.kube.types import Secret
from iscsi_targetd_provisioner.provisioner import IscsiTargetdProvisioner
from iscsi_targetd_provisioner.targetd import Targetd

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
