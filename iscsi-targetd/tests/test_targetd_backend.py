"""The targetd backend: what all promise, and what targetd makes necessary."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.backend_suite import CHAP, ONE, TWO, BackendSuite, Bench
from tests.targetd_server import MIB, PASSWORD, USER, TargetdError, TargetdServer

from external_storage import Deadline, Infeasible, ProvisioningFailed
from iscsi_targetd_provisioner.rpc import Account, Rpc, connect
from iscsi_targetd_provisioner.targetd import Targetd

IQN = "iqn.2003-01.org.linux-iscsi.storage:targetd"
ACCOUNT = Account(user=lambda: USER, password=lambda: PASSWORD)


def backend_of(server: TargetdServer, **arguments: Any) -> Targetd:
    opener = connect("127.0.0.1", server.port, context=None)
    rpc = Rpc(host="storage", account=ACCOUNT, open_stream=opener)
    return Targetd("storage", rpc, iqn=IQN, **arguments)


def soon() -> Deadline:
    return Deadline(time.monotonic() + 60)


@pytest.fixture
def bench(targetd: TargetdServer) -> Bench:
    return Bench(backend_of(targetd), "vg-targetd", passwords=targetd.passwords)


class TestTargetd(BackendSuite):
    """On a thick pool."""


class TestTargetdThin(BackendSuite):
    """On a thin pool."""

    @pytest.fixture
    def bench(self, targetd: TargetdServer) -> Bench:
        return Bench(backend_of(targetd), "fast/thin", passwords=targetd.passwords)


def test_only_the_pools_of_the_configuration_are_used(targetd: TargetdServer) -> None:
    backend = backend_of(targetd, pools=["fast/thin"])
    assert [pool.name for pool in backend.pools(soon())] == ["fast/thin"]
    assert backend.pools(soon())[0].thin
    with pytest.raises(ProvisioningFailed, match="has no pool nowhere; it has: fast/thin, vg-tar"):
        backend_of(targetd, pools=["nowhere"]).pools(soon())


def test_a_thin_volume_that_became_a_thick_one_is_removed_and_told(targetd: TargetdServer) -> None:
    targetd.model.thin_fails = True
    with pytest.raises(Infeasible, match="not in pool fast/thin but beside it"):
        backend_of(targetd).create("fast/thin", "pvc-1", 8 * MIB, deadline=soon())
    assert targetd.model.volumes == {}


def test_with_a_lun_that_cannot_be_listed_nothing_is_made(targetd: TargetdServer) -> None:
    targetd.model.poisoned = True
    with pytest.raises(ProvisioningFailed, match="one of its LUNs is outside its pools"):
        backend_of(targetd).create("vg-targetd", "pvc-1", 8 * MIB, deadline=soon())
    assert targetd.model.volumes == {}


def test_the_lowest_free_lun_is_taken_again(targetd: TargetdServer) -> None:
    bench = Bench(backend_of(targetd), "vg-targetd")
    luns = {}
    for name in ("pvc-1", "pvc-2", "pvc-3"):
        bench.backend.create(bench.pool, name, 4 * MIB, deadline=soon())
        target = bench.backend.export(bench.pool, name, bench.access(ONE), deadline=soon())
        luns[name] = target.lun
    assert luns == {"pvc-1": 0, "pvc-2": 1, "pvc-3": 2}
    bench.remove("pvc-2")
    bench.backend.create(bench.pool, "pvc-4", 4 * MIB, deadline=soon())
    assert bench.backend.export(bench.pool, "pvc-4", bench.access(ONE), deadline=soon()).lun == 1


def test_a_lun_that_another_process_takes_first_is_left_to_it(targetd: TargetdServer) -> None:
    bench = Bench(backend_of(targetd), "vg-targetd")
    for name in ("pvc-1", "pvc-other"):
        bench.backend.create(bench.pool, name, 4 * MIB, deadline=soon())

    def other_is_faster(method: str, do: Callable[[], Any]) -> Any:
        if method == "export_create" and not targetd.model.exports:
            targetd.model.exports[(TWO, 0)] = ("vg-targetd", "pvc-other")
        return do()

    with targetd.faulty(other_is_faster):
        access = bench.access(ONE, TWO)
        target = bench.backend.export(bench.pool, "pvc-1", access, deadline=soon())
    assert target.lun == 1
    assert targetd.model.exports == {
        (TWO, 0): ("vg-targetd", "pvc-other"),
        (ONE, 1): ("vg-targetd", "pvc-1"),
        (TWO, 1): ("vg-targetd", "pvc-1"),
    }


def test_a_target_without_free_luns_is_infeasible(targetd: TargetdServer) -> None:
    bench = Bench(backend_of(targetd, max_lun=1), "vg-targetd")
    bench.make("pvc-1", ONE)
    bench.make("pvc-2", TWO)
    with pytest.raises(Infeasible, match="all 2 LUNs"):
        bench.make("pvc-3", ONE)


def test_half_a_set_of_exports_is_completed_under_the_same_lun(targetd: TargetdServer) -> None:
    bench = Bench(backend_of(targetd), "vg-targetd")
    bench.make("pvc-0", ONE)
    bench.make("pvc-1", ONE)
    target = bench.backend.export(bench.pool, "pvc-1", bench.access(ONE, TWO), deadline=soon())
    assert target.lun == 1
    assert {lun for (_, lun), (_, name) in targetd.model.exports.items() if name == "pvc-1"} == {1}


def test_the_credentials_of_an_initiator_are_its_in_and_the_targets_its_out(
    targetd: TargetdServer,
) -> None:
    Bench(backend_of(targetd), "vg-targetd").make("pvc-1", ONE, chap=CHAP)
    assert targetd.model.auth[ONE] == (
        CHAP.user,
        CHAP.password,
        CHAP.mutual_user,
        CHAP.mutual_password,
    )


def test_that_chap_is_not_enforced_is_told(targetd: TargetdServer) -> None:
    bench = Bench(backend_of(targetd), "vg-targetd")
    bench.make("pvc-1", ONE, chap=CHAP)
    assert targetd.model.tpg_authentication == 0
    assert not bench.backend.enforces_chap
    assert any("authentication=1" in finding.text for finding in bench.backend.check(soon()))


def test_other_errors_are_told_in_targetds_words(targetd: TargetdServer) -> None:
    def fault(_method: str, _do: Callable[[], Any]) -> Any:
        raise TargetdError(-1, "RuntimeError: the disk is on fire")

    with targetd.faulty(fault), pytest.raises(ProvisioningFailed, match=r"on fire \(-1\)"):
        backend_of(targetd).create("vg-targetd", "pvc-1", 8 * MIB, deadline=soon())
