"""Gids: none twice, none lost, reused late."""

import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from external_storage import ProvisioningInBackground
from external_storage.gid_allocator import GidAllocator, GidsExhausted, range_problems
from external_storage.informer import Change
from external_storage.kube.names import ANN_GID
from external_storage.kube.types import ObjectMeta, PersistentVolume


def volume(name: str, gid: str | None = None) -> PersistentVolume:
    annotations = {} if gid is None else {ANN_GID: gid}
    return PersistentVolume(metadata=ObjectMeta(name=name, uid=name, annotations=annotations))


def test_the_same_key_gets_the_same_gid() -> None:
    allocator = GidAllocator()
    assert allocator.allocate("a") == allocator.allocate("a") == 2000
    assert allocator.allocate("a", minimum=5000) == 2000
    assert allocator.allocate("b") == 2001
    assert len(allocator) == 2


def test_a_gid_is_reused_only_when_the_range_has_been_gone_through() -> None:
    allocator = GidAllocator(2000, 2003)
    for key, expected in (("a", 2000), ("b", 2001)):
        assert allocator.allocate(key) == expected
    allocator.release("a")
    assert [allocator.allocate(key) for key in "cde"] == [2002, 2003, 2000]


def test_after_a_restart_it_begins_above_the_highest_in_use() -> None:
    allocator = GidAllocator(2000, 2010)
    allocator.seed([volume("a", "2003"), volume("b", "2007"), volume("c", "70000")])
    assert allocator.allocate("d") == 2008
    assert allocator.allocate("a") == 2003


def test_an_asset_takes_the_gid_that_it_has_unless_another_has_it() -> None:
    allocator = GidAllocator()
    assert allocator.allocate("a") == 2000
    assert not allocator.take("b", 2000)
    assert allocator.take("b", 2005)
    assert allocator.take("b", 2005)
    assert allocator.take("b", 2006)
    assert allocator.take("c", 2005)
    assert len(allocator) == 3


def test_a_gid_that_is_shared_is_free_when_the_last_one_has_released_it() -> None:
    allocator = GidAllocator(2000, 2001)
    assert allocator.allocate("own") == 2000
    for key in ("class", "another class"):
        allocator.share(key, 2000)
    for key in ("own", "class"):
        allocator.release(key)
    assert allocator.allocate("next") == 2001
    with pytest.raises(GidsExhausted):
        allocator.allocate("last")
    allocator.share("another class", 5000)
    assert allocator.allocate("last") == 2000


def test_several_classes_share_one_table() -> None:
    allocator = GidAllocator()
    got = [allocator.allocate(f"a{n}", minimum=3000, maximum=3004) for n in range(3)]
    got += [allocator.allocate(f"b{n}", minimum=3000, maximum=3009) for n in range(7)]
    assert sorted(got) == list(range(3000, 3010))
    with pytest.raises(GidsExhausted, match="3000 to 3004"):
        allocator.allocate("c", minimum=3000, maximum=3004)
    allocator.release("b3")
    assert allocator.allocate("c", minimum=3000, maximum=3009) == got[6]


def test_a_full_range_is_told_and_one_release_helps() -> None:
    allocator = GidAllocator(2000, 2001)
    allocator.allocate("a")
    allocator.allocate("b")
    with pytest.raises(GidsExhausted, match=r"no gid is free in 2000 to 2001.*gidMax"):
        allocator.allocate("c")
    allocator.release("b")
    assert allocator.allocate("c") == 2001


def test_both_ends_of_the_default_range_can_be_had() -> None:
    allocator = GidAllocator()
    assert allocator.allocate("low", maximum=2000) == 2000
    assert allocator.allocate("high", minimum=2**31 - 1) == 2**31 - 1


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (1999, 3000, "'gidMin': 1999 is not within 2000 to 2147483647"),
        (2000, 2**31, "'gidMax': 2147483648 is not within"),
        (3000, 2500, "'gidMin': 3000 is above gidMax, 2500"),
    ],
)
def test_a_bad_range_names_the_parameter(low: int, high: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        GidAllocator().allocate("a", minimum=low, maximum=high)
    assert any(told in problem for problem in range_problems(low, high))


def test_a_good_range_has_no_problems() -> None:
    assert range_problems(2000, 2**31 - 1) == []


@pytest.mark.parametrize("limits", [(0, 10), (11, 10), (1, 2**32 - 1)])
def test_a_table_without_numbers_is_refused(limits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no range"):
        GidAllocator(*limits)


@pytest.mark.parametrize("text", ["", "abc", "-1", "2000 ", "0x10", "٣", "4294967295", "9" * 99])
def test_a_bad_annotation_is_reported_and_left_out(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    allocator = GidAllocator()
    allocator.seed([volume("bad", text), volume("good", "2000"), volume("none")])
    assert [record.getMessage() for record in caplog.records] == [
        "the gid of a volume cannot be read"
    ]
    assert len(allocator) == 1
    assert allocator.allocate("new") == 2001


def test_a_gid_used_twice_is_reported_and_taken_until_both_are_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    allocator = GidAllocator(2000, 2000)
    allocator.seed([volume("a", "2000"), volume("b", "2000")])
    allocator.seed([volume("a", "2000"), volume("b", "2000")])
    assert [record.getMessage() for record in caplog.records] == ["volumes share a gid"]
    allocator.release("a")
    with pytest.raises(GidsExhausted):
        allocator.allocate("c")
    allocator.release("b")
    allocator.release("b")
    assert allocator.allocate("c") == 2000


def test_an_informer_keeps_it_current() -> None:
    allocator = GidAllocator(2000, 2002)
    a, b = volume("a", "2000"), volume("b", "2001")
    allocator.observe(Change(None, a))
    allocator.observe(Change(None, b))
    allocator.observe(Change(b, volume("b", "2002")))
    assert allocator.allocate("c") == 2001
    allocator.observe(Change(a, None))
    assert allocator.allocate("d") == 2000


def test_a_released_gid_does_not_come_back_with_an_update_of_its_volume() -> None:
    allocator = GidAllocator(2000, 2000)
    allocator.observe(Change(None, volume("a", "2000")))
    allocator.release("a")
    allocator.observe(Change(volume("a", "2000"), volume("a", "2000")))
    assert allocator.allocate("b") == 2000


def test_a_reservation_is_kept_by_success_and_rolled_back_by_failure() -> None:
    allocator = GidAllocator(2000, 2000)
    with pytest.raises(OSError, match="mkdir"), allocator.reserve("a") as gid:  # noqa: PT012
        assert gid == 2000
        raise OSError("mkdir")
    with allocator.reserve("b") as gid:
        assert gid == 2000
    assert allocator.allocate("b") == 2000
    with pytest.raises(GidsExhausted), allocator.reserve("c"):
        pytest.fail("nothing is left")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_reservation_is_rolled_back_by_an_interruption(error: type[BaseException]) -> None:
    allocator = GidAllocator()
    with pytest.raises(error), allocator.reserve("a"):
        raise error
    assert len(allocator) == 0


def test_a_gid_the_key_had_before_is_not_rolled_back() -> None:
    allocator = GidAllocator()
    allocator.seed([volume("a", "2500")])
    with pytest.raises(OSError, match="late"), allocator.reserve("a") as gid:  # noqa: PT012
        assert gid == 2500
        raise OSError("late")
    assert allocator.allocate("a") == 2500


def test_work_in_the_background_keeps_its_gid() -> None:
    allocator = GidAllocator()
    with pytest.raises(ProvisioningInBackground), allocator.reserve("a") as first:
        raise ProvisioningInBackground("still copying")
    allocator.allocate("other")
    with allocator.reserve("a") as second:
        assert second == first


def test_threads_never_get_the_same_gid() -> None:
    allocator = GidAllocator(2000, 2000 + 8 * 300)
    got: list[list[int]] = [[] for _ in range(8)]
    ready = threading.Barrier(8)

    def work(mine: list[int], name: str) -> None:
        ready.wait(30)
        for number in range(300):
            mine.append(allocator.allocate(f"{name}-{number}"))
            allocator.allocate(f"{name}-again")
            allocator.release(f"{name}-again")

    threads = [threading.Thread(target=work, args=(got[n], f"t{n}")) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    numbers = [gid for mine in got for gid in mine]
    assert len(set(numbers)) == len(numbers) == 8 * 300


KEYS = st.sampled_from([f"k{n}" for n in range(12)])
GIDS = st.integers(2000, 2011)


class AgainstANaiveModel(RuleBasedStateMachine):
    """A dictionary of what each key has, searched from end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = GidAllocator(2000, 2011)
        self.model: dict[str, int] = {}
        self.cursors: dict[tuple[int, int], int] = {}

    def _expected(self, low: int, high: int) -> int | None:
        used = set(self.model.values())
        highest = max((gid for gid in used if gid <= high), default=low - 1)
        start = self.cursors.get((low, high), max(low, highest + 1))
        order = [*range(start, high + 1), *range(low, min(start, high + 1))]
        return next((gid for gid in order if gid not in used), None)

    @rule(key=KEYS, ends=st.tuples(GIDS, GIDS), fails=st.booleans())
    def reserve(self, key: str, ends: tuple[int, int], fails: bool) -> None:
        low, high = min(ends), max(ends)
        known = self.model.get(key)
        expected = self._expected(low, high) if known is None else known
        try:
            with self.allocator.reserve(key, minimum=low, maximum=high) as gid:
                assert gid == expected
                if known is None:
                    self.cursors[low, high] = gid + 1
                if fails:
                    raise OSError
                self.model[key] = gid
        except GidsExhausted:
            assert expected is None
        except OSError:
            assert fails

    @rule(key=KEYS)
    def release(self, key: str) -> None:
        self.allocator.release(key)
        self.model.pop(key, None)

    @rule(key=KEYS, gid=st.integers(1990, 2020))
    def seed(self, key: str, gid: int) -> None:
        self.allocator.seed([volume(key, str(gid))])
        self.model[key] = gid

    @precondition(lambda self: self.model)
    @rule()
    def everything_known_is_given_again(self) -> None:
        for key, gid in self.model.items():
            assert self.allocator.allocate(key) == gid

    @invariant()
    def as_many(self) -> None:
        assert len(self.allocator) == len(self.model)


TestAgainstANaiveModel = AgainstANaiveModel.TestCase
TestAgainstANaiveModel.settings = settings(max_examples=150, deadline=None)


@given(st.lists(st.integers(1, 40), min_size=1, unique=True), st.data())
def test_the_work_grows_with_the_runs_and_not_with_the_gids(
    gids: list[int], data: st.DataObject
) -> None:
    allocator = GidAllocator(1, 100)
    allocator.seed(volume(f"v{gid}", str(gid)) for gid in gids)
    gone = data.draw(st.sets(st.sampled_from(gids)))
    for gid in gone:
        allocator.release(f"v{gid}")
    left = set(gids) - gone
    runs = sum(gid - 1 not in left for gid in left)
    count: Callable[[list[int]], int] = len
    assert count(allocator._used._firsts) == count(allocator._used._lasts) == runs
