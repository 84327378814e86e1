"""Who has which directory, and what was promised."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_storage import PersistentVolume
from nfs_client_provisioner.ledger import Conflict, Entry, Ledger, Place


def place(path: str, server: str = "one") -> Place:
    return Place(server=server, path=path)


def entry(path: str, capacity: int = 1, server: str = "one") -> Entry:
    return Entry(place=place(path, server), capacity=capacity)


def volume(name: str, path: str, size: str = "1Gi") -> PersistentVolume:
    fields = {
        "metadata": {"name": name},
        "spec": {"nfs": {"server": "h", "path": path}, "capacity": {"storage": size}},
    }
    return msgspec.convert(fields, PersistentVolume)


def place_of(found: PersistentVolume) -> Place | None:
    path = found.spec.nfs.path if found.spec.nfs is not None else ""
    return place(path.removeprefix("/e/")) if path.startswith("/e/") else None


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(place_of)


def test_n19_a_second_volume_with_the_same_directory_is_refused_unless_shared(
    ledger: Ledger,
) -> None:
    with ledger.reserve("a", entry("ns/data"), shared=False):
        pass
    with (
        pytest.raises(Conflict, match="is that of volume a"),
        ledger.reserve("b", entry("ns/data"), shared=False),
    ):
        pytest.fail("it was let in")
    with ledger.reserve("b", entry("ns/data"), shared=True):
        assert ledger.company("a", place("ns/data")) == {"b"}
    with ledger.reserve("c", entry("ns/data", server="two"), shared=False):
        assert ledger.company("c", place("ns/data", "two")) == set()


@pytest.mark.parametrize("path", ["ns", "ns/data/below"])
def test_a_directory_within_another_volumes_is_refused_even_if_shared(
    ledger: Ledger, path: str
) -> None:
    ledger.observe(None, volume("a", "/e/ns/data"))
    with pytest.raises(Conflict), ledger.reserve("b", entry(path), shared=True):
        pytest.fail("it was let in")
    with ledger.reserve("b", entry("ns/data2"), shared=False):
        pass


def test_a_directory_around_others_is_not_removed_before_they_are_gone(ledger: Ledger) -> None:
    outer, inner = volume("outer", "/e/ns"), volume("inner", "/e/ns/data")
    ledger.observe(None, outer)
    ledger.observe(None, inner)
    with pytest.raises(Conflict, match="1 other volumes are below 'ns'"):
        ledger.refuse_around(place("ns"))
    ledger.refuse_around(place("ns/data"))
    ledger.observe(inner, None)
    ledger.refuse_around(place("ns"))


def test_a_reservation_that_fails_is_taken_back(ledger: Ledger) -> None:
    counted = 0

    def fail() -> None:
        nonlocal counted
        with ledger.reserve("a", entry("x", 5), shared=False):
            counted = ledger.promised("one", without="b")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert counted == 5
    assert ledger.promised("one", without="b") == 0
    with ledger.reserve("b", entry("x"), shared=False):
        pass


def test_a_retry_of_a_reserved_volume_stays_reserved_when_it_fails(ledger: Ledger) -> None:
    with ledger.reserve("a", entry("x", 5), shared=False):
        pass
    with pytest.raises(RuntimeError), ledger.reserve("a", entry("x", 5), shared=False):
        raise RuntimeError
    assert ledger.promised("one", without="") == 5


def test_late_news_of_a_deleted_volume_does_not_bring_it_back(ledger: Ledger) -> None:
    before = volume("a", "/e/x")
    ledger.observe(None, before)
    ledger.ended("a")
    ledger.observe(before, volume("a", "/e/x", "2Gi"))
    assert ledger.promised("one", without="") == 0
    ledger.observe(before, None)
    ledger.observe(None, before)
    assert ledger.promised("one", without="") == 1 << 30


def test_what_is_promised_follows_the_volumes(ledger: Ledger) -> None:
    ledger.observe(None, volume("a", "/e/a", "2Gi"))
    ledger.observe(None, volume("b", "/e/b", "3Gi"))
    ledger.observe(None, volume("elsewhere", "/f/c", "9Gi"))
    assert ledger.promised("one", without="b") == 2 << 30
    ledger.observe(volume("b", "/e/b", "3Gi"), volume("b", "/e/b", "4Gi"))
    assert ledger.promised("one", without="") == 6 << 30
    assert ledger.promised("two", without="") == 0


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["come", "go", "reserve", "fail", "end"]),
        st.sampled_from("abc"),
        st.sampled_from(["x", "x/y", "x/y/z", "w"]),
    ),
    max_size=20,
)


@given(steps=_STEPS)
def test_whatever_happens_no_trace_is_left_of_volumes_that_are_gone(
    steps: list[tuple[str, str, str]],
) -> None:
    ledger = Ledger(place_of)
    for what, name, path in steps:
        found = volume(name, f"/e/{path}")
        if what == "come":
            ledger.observe(None, found)
        elif what == "go":
            ledger.observe(found, None)
        elif what == "end":
            ledger.ended(name)
        else:
            try:
                with ledger.reserve(name, entry(path), shared=False):
                    if what == "fail":
                        raise RuntimeError
            except (Conflict, RuntimeError):
                pass
    for name in "abc":
        ledger.observe(volume(name, "/e/x"), None)
    assert ledger.promised("one", without="") == 0
    for path in ("x", "x/y", "x/y/z", "w"):
        ledger.refuse_around(place(path))
        with ledger.reserve("new", entry(path), shared=False):
            pass
        ledger.ended("new")
