"""A fault at every call to the storage host: in the end there is one volume, or none."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from tests.on_targetd import LOST_S, is_gone, is_there_once, persist, request, saved
from tests.targetd_server import MIB, TargetdServer

from external_storage import (
    Deadline,
    ProvisionerError,
    ProvisioningFailed,
    ProvisioningInBackground,
    Unchanged,
)
from iscsi_targetd_provisioner.provisioner import IscsiTargetdProvisioner

HOW = ("before", "after", "lost")


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
