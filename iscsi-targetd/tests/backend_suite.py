"""What every backend promises, whatever the host is reached by. Subclass it, with a ``bench``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from external_storage import Deadline, Infeasible, ProvisioningFailed, VolumeInUse
from iscsi_targetd_provisioner.backend import Access, Backend, Grade
from iscsi_targetd_provisioner.chap import Chap
from iscsi_targetd_provisioner.names import Portal

MIB = 1 << 20
ONE = "iqn.2026-01.com.example:one"
TWO = "iqn.2026-01.com.example:two"
THREE = "iqn.2026-01.com.example:three"
CHAP = Chap("alice", "a secret of alice", "bob", "a secret of bob")


@dataclass
class Bench:
    """A backend, and what its host has."""

    backend: Backend
    pool: str
    """With at least 64 MiB and less than 1 TiB free."""
    portals: tuple[Portal, ...] = (Portal("127.0.0.1"),)
    passwords: Callable[[str], set[str]] = lambda _volume: set()
    """What initiators of a volume have to show: one entry if it is the same for all."""

    def access(self, *initiators: str, chap: Chap | None = None) -> Access:
        return Access(initiators=frozenset(initiators), portals=self.portals, chap=chap)

    @property
    def deadline(self) -> Deadline:
        return Deadline(time.monotonic() + 60)

    def within(self, seconds: float) -> Deadline:
        return Deadline(time.monotonic() + seconds)

    def initiators(self, name: str) -> set[str]:
        exports = self.backend.exports(self.deadline)
        return {i for export in exports if export.volume == name for i in export.initiators}

    def names(self) -> set[str]:
        return {volume.name for volume in self.backend.volumes(self.deadline)}

    def make(self, name: str, *initiators: str, chap: Chap | None = None) -> None:
        self.backend.create(self.pool, name, 8 * MIB, deadline=self.deadline)
        access = self.access(*initiators, chap=chap)
        self.backend.export(self.pool, name, access, deadline=self.deadline)

    def remove(self, name: str) -> None:
        self.backend.unexport(self.pool, name, deadline=self.deadline)
        self.backend.destroy(self.pool, name, deadline=self.deadline)


class BackendSuite:
    """The promises of ``Backend``."""

    def test_a_pool_tells_what_is_left(self, bench: Bench) -> None:
        def free() -> int:
            pools = bench.backend.pools(bench.deadline)
            return next(pool.free for pool in pools if pool.name == bench.pool)

        before = free()
        bench.backend.create(bench.pool, "pvc-1", 8 * MIB, deadline=bench.deadline)
        assert free() == before - 8 * MIB
        bench.backend.destroy(bench.pool, "pvc-1", deadline=bench.deadline)
        assert free() == before

    def test_a_volume_has_the_size_that_it_says(self, bench: Bench) -> None:
        made = bench.backend.create(bench.pool, "pvc-1", 5 * MIB + 1, deadline=bench.deadline)
        assert made.size >= 5 * MIB + 1
        assert made in bench.backend.volumes(bench.deadline)
        bench.remove("pvc-1")

    def test_making_a_volume_again_finds_it(self, bench: Bench) -> None:
        first = bench.backend.create(bench.pool, "pvc-1", 8 * MIB, deadline=bench.deadline)
        again = bench.backend.create(bench.pool, "pvc-1", 8 * MIB, deadline=bench.deadline)
        assert again == first
        larger = bench.backend.create(bench.pool, "pvc-1", 12 * MIB, deadline=bench.deadline)
        assert larger.size >= 12 * MIB
        bench.remove("pvc-1")

    def test_too_little_space_is_infeasible_and_leaves_nothing(self, bench: Bench) -> None:
        with pytest.raises(Infeasible):
            bench.backend.create(bench.pool, "pvc-1", 1 << 40, deadline=bench.deadline)
        assert bench.names() == set()

    def test_a_volume_grows_and_never_shrinks(self, bench: Bench) -> None:
        bench.make("pvc-1", ONE)
        grown = bench.backend.resize(bench.pool, "pvc-1", 16 * MIB, deadline=bench.deadline)
        assert grown.size == 16 * MIB
        for size in (16 * MIB, 4 * MIB):
            again = bench.backend.resize(bench.pool, "pvc-1", size, deadline=bench.deadline)
            assert again.size == 16 * MIB
        with pytest.raises(Infeasible):
            bench.backend.resize(bench.pool, "pvc-1", 1 << 40, deadline=bench.deadline)
        bench.remove("pvc-1")

    def test_growing_what_is_not_there_fails(self, bench: Bench) -> None:
        with pytest.raises(ProvisioningFailed):
            bench.backend.resize(bench.pool, "pvc-1", 16 * MIB, deadline=bench.deadline)

    def test_exports_are_exactly_those_asked_for(self, bench: Bench) -> None:
        bench.make("pvc-1", ONE, TWO)
        assert bench.initiators("pvc-1") == {ONE, TWO}
        access = bench.access(TWO, THREE)
        bench.backend.export(bench.pool, "pvc-1", access, deadline=bench.deadline)
        assert bench.initiators("pvc-1") == {TWO, THREE}
        bench.remove("pvc-1")

    def test_exporting_again_changes_nothing(self, bench: Bench) -> None:
        bench.backend.create(bench.pool, "pvc-1", 8 * MIB, deadline=bench.deadline)
        access = bench.access(ONE, TWO, chap=CHAP)
        first = bench.backend.export(bench.pool, "pvc-1", access, deadline=bench.deadline)
        before = bench.backend.exports(bench.deadline)
        again = bench.backend.export(bench.pool, "pvc-1", access, deadline=bench.deadline)
        assert again == first
        assert bench.backend.exports(bench.deadline) == before
        bench.remove("pvc-1")

    def test_volumes_do_not_share_what_nodes_tell_them_apart_by(self, bench: Bench) -> None:
        targets = set()
        for name in ("pvc-1", "pvc-2", "pvc-3"):
            bench.backend.create(bench.pool, name, 4 * MIB, deadline=bench.deadline)
            access = bench.access(ONE)
            targets.add(bench.backend.export(bench.pool, name, access, deadline=bench.deadline))
        assert len(targets) == 3
        for name in ("pvc-1", "pvc-2", "pvc-3"):
            bench.remove(name)

    def test_an_exported_volume_is_not_destroyed(self, bench: Bench) -> None:
        bench.make("pvc-1", ONE)
        with pytest.raises(VolumeInUse):
            bench.backend.destroy(bench.pool, "pvc-1", deadline=bench.deadline)
        assert bench.names() == {"pvc-1"}
        bench.remove("pvc-1")

    def test_removing_what_is_gone_is_a_success(self, bench: Bench) -> None:
        bench.make("pvc-1", ONE, TWO)
        for _ in range(2):
            bench.remove("pvc-1")
        assert bench.names() == set()
        assert bench.backend.exports(bench.deadline) == []

    def test_exporting_what_is_not_there_fails_and_leaves_nothing(self, bench: Bench) -> None:
        access = bench.access(ONE)
        with pytest.raises(ProvisioningFailed):
            bench.backend.export(bench.pool, "pvc-1", access, deadline=bench.deadline)
        assert bench.backend.exports(bench.deadline) == []

    def test_credentials_can_be_replaced_and_taken_away(self, bench: Bench) -> None:
        bench.make("pvc-1", ONE, chap=CHAP)
        assert bench.passwords("pvc-1") == {CHAP.password}
        other = Chap("alice", "another secret")
        for chap, password in ((other, "another secret"), (None, "")):
            access = bench.access(ONE, chap=chap)
            bench.backend.set_auth(bench.pool, "pvc-1", access, deadline=bench.deadline)
            assert bench.passwords("pvc-1") == {password}
        bench.remove("pvc-1")

    def test_the_check_of_a_good_host_finds_nothing_bad(self, bench: Bench) -> None:
        found = bench.backend.check(bench.deadline)
        assert found
        assert [finding for finding in found if finding.grade is Grade.BAD] == []

    def test_credentials_do_not_show_in_what_is_printed_of_an_access(self, bench: Bench) -> None:
        assert CHAP.password not in repr(bench.access(ONE, chap=CHAP))
