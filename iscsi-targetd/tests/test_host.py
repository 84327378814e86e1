"""The helper over models of LVM and LIO: what all backends promise, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.backend_suite import CHAP, ONE, THREE, TWO, BackendSuite, Bench
from tests.fake_host import GROUP, IQN, MIB, PORTAL, THIN, FakeHost

from external_storage import (
    Infeasible,
    Owner,
    OwnerUnknown,
    ProvisionerError,
    ProvisioningFailed,
    Unchanged,
)
from iscsi_targetd_provisioner.backend import Access, Grade
from iscsi_targetd_provisioner.chap import Chap
from iscsi_targetd_provisioner.helper_session import HelperRefused
from iscsi_targetd_provisioner.host import common
from iscsi_targetd_provisioner.names import Portal

NAME = "pvc-1"
TARGET = f"{IQN}:{NAME}"
FOREIGN = "iqn.2026-01.com.example:of-an-admin"


@pytest.fixture
def bench(host: FakeHost) -> Bench:
    return Bench(host.backend(), GROUP, portals=(PORTAL,), passwords=host.rtslib.passwords)


class TestThick(BackendSuite):
    """On a volume group."""


class TestThin(BackendSuite):
    """On a thin pool."""

    @pytest.fixture
    def bench(self, host: FakeHost) -> Bench:
        return Bench(host.backend(), THIN, portals=(PORTAL,), passwords=host.rtslib.passwords)


# -- what is another's


def test_a_foreign_target_is_left_as_it_is(host: FakeHost, bench: Bench) -> None:
    host.rtslib.BlockStorageObject("admins", dev="/dev/sdz")
    target = host.rtslib.foreign_target(TARGET, "admins")
    bench.backend.create(bench.pool, NAME, 8 * MIB, deadline=bench.deadline)
    with pytest.raises(HelperRefused, match="other LUNs: it is left alone"):
        bench.backend.export(bench.pool, NAME, bench.access(ONE), deadline=bench.deadline)
    assert host.rtslib.targets == {TARGET: target}
    assert target.tpgs[0].attributes == {"generate_node_acls": "1"}
    assert set(host.rtslib.backstores) == {"admins"}
    # Nor is it taken away when the volume goes.
    bench.remove(NAME)
    assert host.rtslib.targets == {TARGET: target}


def test_a_volume_that_an_admin_exports_too_is_not_taken_from_him(
    host: FakeHost, bench: Bench
) -> None:
    bench.make(NAME, ONE)
    host.rtslib.foreign_target(FOREIGN, NAME)
    for call in (
        lambda: bench.backend.unexport(bench.pool, NAME, deadline=bench.deadline),
        lambda: bench.backend.export(
            bench.pool, NAME, bench.access(ONE, TWO), deadline=bench.deadline
        ),
    ):
        with pytest.raises(HelperRefused, match=f"exported by {FOREIGN} too"):
            call()
    assert set(host.rtslib.targets) == {TARGET, FOREIGN}
    assert host.rtslib.initiators(TARGET) == {ONE}


def test_a_target_of_ours_that_an_admin_gave_a_second_lun_is_left(
    host: FakeHost, bench: Bench
) -> None:
    bench.make(NAME, ONE)
    other = host.rtslib.BlockStorageObject("admins", dev="/dev/sdz")
    host.rtslib.LUN(host.rtslib.targets[TARGET].tpgs[0], 1, other)
    with pytest.raises(HelperRefused, match="other LUNs"):
        bench.backend.unexport(bench.pool, NAME, deadline=bench.deadline)
    assert TARGET in host.rtslib.targets


@pytest.mark.parametrize("call", ["BlockStorageObject", "Target", "TPG", "LUN", "NetworkPortal"])
def test_what_the_kernel_refuses_leaves_nothing_of_the_export(
    host: FakeHost, bench: Bench, call: str
) -> None:
    bench.backend.create(bench.pool, NAME, 8 * MIB, deadline=bench.deadline)
    host.rtslib.fail = call
    with pytest.raises(ProvisioningFailed):
        bench.backend.export(bench.pool, NAME, bench.access(ONE), deadline=bench.deadline)
    assert (host.rtslib.targets, host.rtslib.backstores) == ({}, {})


def test_what_was_exported_before_stays_when_the_kernel_refuses_a_change(
    host: FakeHost, bench: Bench
) -> None:
    bench.make(NAME, ONE)
    host.rtslib.fail = "MappedLUN"
    with pytest.raises(ProvisioningFailed):
        bench.backend.export(bench.pool, NAME, bench.access(ONE, TWO), deadline=bench.deadline)
    assert ONE in host.rtslib.initiators(TARGET)


def test_one_initiator_that_lio_does_not_take_costs_the_others_nothing(
    host: FakeHost, bench: Bench
) -> None:
    bad = "iqn.2026-01.com"
    bench.backend.create(bench.pool, NAME, 8 * MIB, deadline=bench.deadline)
    access = bench.access(ONE, bad, TWO)
    target = bench.backend.export(bench.pool, NAME, access, deadline=bench.deadline)
    assert target.refused == {bad}
    assert host.rtslib.initiators(TARGET) == {ONE, TWO}
    with pytest.raises(HelperRefused, match="no name of an initiator is taken"):
        bench.make("pvc-2", bad)


def test_a_volume_group_that_is_away_is_not_a_volume_that_is_gone(
    host: FakeHost, bench: Bench
) -> None:
    bench.make(NAME, ONE)
    host.lvm.away = True
    again = Bench(host.backend(), bench.pool)
    with pytest.raises(ProvisioningFailed, match='Volume group "vg-iscsi" not found'):
        again.backend.unexport(again.pool, NAME, deadline=again.deadline)
    assert TARGET in host.rtslib.targets
    for backend in (bench.backend, again.backend):
        host.rtslib.backstores.clear()
        with pytest.raises(ProvisioningFailed, match='Volume group "vg-iscsi" not found'):
            backend.destroy(bench.pool, NAME, deadline=bench.deadline)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ('Failed to find logical volume "vg/lv"', "not_found"),
        ('Volume group "vg" not found Cannot process volume group vg', "failed"),
        ('Volume group "vg" has insufficient free space (1 extents): 9 required.', "no_space"),
        ('Logical Volume "lv" already exists in volume group "vg"', "exists"),
        ("Logical volume vg/lv in use.", "in_use"),
    ],
)
def test_the_words_of_lvm_are_understood(said: str, kind: str) -> None:
    assert common.kind_of(said) == kind


def test_another_pool_than_those_configured_is_not_used(host: FakeHost) -> None:
    bench = Bench(host.backend(pools={THIN: 1.0}), GROUP)
    with pytest.raises(ProvisioningFailed, match="pool vg-iscsi is not configured"):
        bench.backend.create(GROUP, NAME, 8 * MIB, deadline=bench.deadline)
    with pytest.raises(ProvisioningFailed, match="pool vg-iscsi is not configured"):
        bench.backend.resize(GROUP, NAME, 8 * MIB, deadline=bench.deadline)
    assert host.lvm.volumes == {}


def test_a_thin_pool_promises_no_more_than_it_may(host: FakeHost) -> None:
    """64 MiB; what is there counts with all that it may grow to, not with what it has."""
    for overcommit, most in ((1.0, 64), (2.0, 128)):
        bench = Bench(host.backend(pools={THIN: overcommit}), THIN)
        bench.backend.create(THIN, NAME, 32 * MIB, deadline=bench.deadline)
        with pytest.raises(Infeasible, match=f"has {(most - 32) * MIB} bytes left to promise"):
            bench.backend.create(THIN, "pvc-2", (most - 31) * MIB, deadline=bench.deadline)
        with pytest.raises(Infeasible, match="left to promise"):
            bench.backend.resize(THIN, NAME, (most + 1) * MIB, deadline=bench.deadline)
        grown = bench.backend.resize(THIN, NAME, most * MIB, deadline=bench.deadline)
        assert grown.size == most * MIB
        bench.remove(NAME)


def test_volumes_of_another_cluster_are_another_ones(host: FakeHost) -> None:
    """Both have the default provisioner name."""
    names = ("iscsi-targetd",)
    ours = Bench(host.backend(owner=lambda: Owner("cluster-1", names)), GROUP)
    theirs = Bench(host.backend(owner=lambda: Owner("cluster-2", names)), GROUP)
    ours.make(NAME, ONE)
    assert (ours.names(), theirs.names()) == ({NAME}, set())
    for call in (theirs.backend.unexport, theirs.backend.destroy):
        with pytest.raises(ProvisionerError):
            call(GROUP, NAME, deadline=theirs.deadline)
    assert TARGET in host.rtslib.targets
    # Under another name of ours they stay ours.
    renamed = Owner("cluster-1", ("example.com/new", "iscsi-targetd"))
    later = Bench(host.backend(owner=lambda: renamed), GROUP)
    assert later.names() == {NAME}
    later.make("pvc-2", ONE)
    assert ours.names() == {NAME}
    later.remove(NAME)


def test_without_knowing_which_cluster_this_is_nothing_is_made(host: FakeHost) -> None:
    def unknown() -> Owner:
        raise OwnerUnknown("not allowed to")

    bench = Bench(host.backend(owner=unknown), GROUP)
    with pytest.raises(Unchanged, match="not allowed to"):
        bench.make(NAME, ONE)
    assert host.lvm.volumes == {}


# -- credentials


def test_who_is_logged_in_keeps_the_secret_it_logged_in_with(host: FakeHost, bench: Bench) -> None:
    bench.make(NAME, ONE, TWO, chap=CHAP)
    host.rtslib.logged_in = {(TARGET, ONE)}
    access = bench.access(ONE, TWO, THREE, chap=Chap("alice", "another secret"))

    def passwords() -> dict[str, str]:
        acls = host.rtslib.targets[TARGET].tpgs[0].node_acls
        return {acl.node_wwn: acl.chap_password for acl in acls}

    for _ in range(2):
        kept = bench.backend.set_auth(bench.pool, NAME, access, deadline=bench.deadline)
        assert kept == {ONE}
        assert passwords()[ONE] == CHAP.password
        assert passwords()[TWO] == "another secret"
        bench.backend.export(bench.pool, NAME, access, deadline=bench.deadline)
    host.rtslib.logged_in.clear()
    assert not bench.backend.set_auth(bench.pool, NAME, access, deadline=bench.deadline)
    assert set(passwords().values()) == {"another secret"}


def test_a_refusal_in_the_midst_of_setting_a_secret_does_not_show_it(
    host: FakeHost, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_tpg: Any, _acls: Any, chap: Any) -> None:
        raise OSError(f"cannot write {chap['password']} and {chap['mutual_password']}")

    bench.make(NAME, ONE, chap=CHAP)
    monkeypatch.setattr("iscsi_targetd_provisioner.host.lio._authenticate", refuse)
    access = bench.access(ONE, chap=CHAP)
    with pytest.raises(ProvisioningFailed, match=r"cannot write \*\*\* and \*\*\*") as caught:
        bench.backend.set_auth(bench.pool, NAME, access, deadline=bench.deadline)
    assert CHAP.password not in str(caught.value)
    assert host.rtslib.targets[TARGET]


# -- the disk that nodes see


def test_a_backstore_that_is_made_again_is_the_same_disk(host: FakeHost, bench: Bench) -> None:
    serials = set()
    for _ in range(2):
        bench.make(NAME, ONE)
        serials.add(host.rtslib.backstores[NAME].wwn)
        host.rtslib.targets.clear()
        host.rtslib.backstores.clear()
    bench.make("pvc-2", ONE)
    assert len(serials) == 1
    assert host.rtslib.backstores["pvc-2"].wwn not in serials


def test_what_is_deleted_in_a_volume_can_go_back_to_its_pool(host: FakeHost, bench: Bench) -> None:
    bench.make(NAME, ONE)
    assert host.rtslib.backstores[NAME].attributes["emulate_tpu"] == "1"
    bench.backend.create(bench.pool, "pvc-2", 8 * MIB, deadline=bench.deadline)
    (host.lvm.sys / "pvc-2/queue/discard_max_bytes").write_text("0\n")
    access = bench.access(ONE)
    bench.backend.export(bench.pool, "pvc-2", access, deadline=bench.deadline)
    assert "emulate_tpu" not in host.rtslib.backstores["pvc-2"].attributes


def test_a_name_or_a_portal_that_no_target_can_have_is_infeasible(bench: Bench) -> None:
    access = Access(initiators={ONE}, iqn="iqn.2026-01.com.example:" + "x" * 180)
    bench.backend.check_access("pvc-1", access)
    with pytest.raises(Infeasible, match="longer than 223 bytes"):
        bench.backend.check_access("pvc-" + "1" * 36, access)


def test_a_target_cannot_listen_on_the_name_of_a_host(host: FakeHost) -> None:
    backend = host.backend()
    backend._listen = ()
    access = Access(initiators={ONE}, portals=(Portal("storage.example.com"),))
    with pytest.raises(Infeasible, match=r"cannot listen on storage\.example\.com"):
        backend.check_access(NAME, access)


def test_the_check_looks_at_the_portals_that_nodes_are_told(host: FakeHost) -> None:
    backend = host.backend(portals=(Portal("192.0.2.1"),))
    backend._listen = ()
    found = backend.check(Bench(backend, GROUP).deadline)
    assert any(f.grade is Grade.BAD and "192.0.2.1" in f.text for f in found)


# -- what an admin is told of the host


def told(host: FakeHost, grade: Grade) -> str:
    backend = host.backend()
    return "\n".join(
        f"{finding.text} ({finding.advice})"
        for finding in backend.check(Bench(backend, GROUP).deadline)
        if finding.grade is grade
    )


def test_the_check_says_what_is_wrong_with_a_host_and_what_to_do(
    host: FakeHost, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.make(NAME, ONE)
    assert told(host, Grade.BAD) == told(host, Grade.WARNING) == ""
    # Thin pools that are about to stop every volume in them.
    host.lvm.fill = 93.0
    assert "thin pool vg-iscsi/thin: its data is 93 % full (lvextend" in told(host, Grade.BAD)
    host.lvm.fill = 0.0
    # What is running and would not come back after a boot.
    saved_file = Path(host.rtslib.save_file)
    text = saved_file.read_text()
    saved_file.write_text('{"targets": []}')
    assert f"such as {TARGET} (targetcli saveconfig)" in told(host, Grade.WARNING)
    saved_file.write_text("{")
    assert "is damaged" in told(host, Grade.BAD)
    saved_file.write_text(text)
    host.lvm.service = "disabled"
    assert "(systemctl enable target.service or" in told(host, Grade.WARNING)
    host.lvm.service = "enabled"
    host.lvm.away = True
    assert told(host, Grade.BAD)
    host.lvm.away = False
    monkeypatch.setattr("iscsi_targetd_provisioner.host.diagnose.TARGET_MODULE", Path("/nowhere"))
    assert "(modprobe iscsi_target_mod)" in told(host, Grade.BAD)


def test_the_check_of_a_host_that_cannot_be_reached_says_why(host: FakeHost) -> None:
    backend = host.backend()

    def refuse(*_args: object) -> Any:
        raise Unchanged("no route to it")

    backend._helper.open_channel = refuse
    [finding] = backend.check(Bench(backend, GROUP).deadline)
    assert (finding.grade, finding.text) == (Grade.BAD, "no route to it")
