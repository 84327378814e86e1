"""The indexed local copy."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_storage.informer import Change, Lister, Store
from external_storage.kube.types import PersistentVolumeClaim
from external_storage.testing.builders import claim

Claim = PersistentVolumeClaim


def by_class(item: Claim) -> Iterable[str]:
    return (item.spec.storage_class_name or "",)


def by_mode(item: Claim) -> Iterable[str]:
    return item.spec.access_modes


def kept(item: Claim) -> bool:
    return item.spec.volume_mode != "Block"


INDEXES = {"class": by_class, "mode": by_mode}


@pytest.fixture
def store() -> Store[Claim]:
    return Store(indexes=INDEXES, keep=kept)


def test_an_addition_a_change_and_a_deletion_are_told(store: Store[Claim]) -> None:
    first, second = claim(resource_version="1"), claim(resource_version="2")
    assert store.apply(first) == [Change(None, first)]
    assert store.apply(second) == [Change(first, second)]
    assert store.apply(claim(resource_version="3"), deleted=True) == [Change(second, None)]
    assert store.get("default/data") is None


def test_the_same_resource_version_again_is_no_change(store: Store[Claim]) -> None:
    store.apply(claim())
    assert store.apply(claim()) == []
    assert store.replace([claim()]) == []


def test_the_deletion_of_what_is_not_there_is_no_change(store: Store[Claim]) -> None:
    assert store.apply(claim(), deleted=True) == []


def test_replace_tells_only_what_differs_from_before(store: Store[Claim]) -> None:
    same, old, gone = claim(name="same"), claim(name="changed"), claim(name="gone")
    store.replace([same, old, gone])
    changed, added = claim(name="changed", resource_version="2"), claim(name="added")
    changes = store.replace([added, changed, same])
    expected = [Change(gone, None), Change(old, changed), Change(None, added)]
    assert sorted(changes, key=repr) == sorted(expected, key=repr)


def test_a_name_that_was_taken_by_another_object_is_a_deletion_and_an_addition(
    store: Store[Claim],
) -> None:
    first, second = claim(uid="1"), claim(uid="2", resource_version="2")
    store.apply(first)
    assert store.replace([second]) == [Change(first, None), Change(None, second)]


def test_what_keep_refuses_is_never_held(store: Store[Claim]) -> None:
    assert store.apply(claim(volume_mode="Block")) == []
    assert store.replace([claim(volume_mode="Block")]) == []
    assert len(store) == 0


def test_an_object_that_stops_being_kept_counts_as_deleted(store: Store[Claim]) -> None:
    store.apply(claim())
    changed = claim(volume_mode="Block", resource_version="2")
    assert store.apply(changed) == [Change(claim(), None)]
    assert store.values() == []


def test_a_lister_reads_by_name_by_index_and_all(store: Store[Claim]) -> None:
    lister = Lister(store)
    mine, other = claim(class_name="fast"), claim(namespace="other")
    store.replace([mine, other])
    assert lister.get("data", namespace="default") is mine
    assert lister.get("data") is None
    assert lister.by_index("class", "fast") == [mine]
    assert lister.by_index("class", "unknown") == []
    assert lister.all() == [mine, other]
    assert len(lister) == 2


def test_an_unknown_index_is_an_error(store: Store[Claim]) -> None:
    with pytest.raises(KeyError):
        Lister(store).by_index("colour", "red")


def test_what_a_lister_returned_does_not_change_later(store: Store[Claim]) -> None:
    store.apply(claim())
    before = Lister(store).all()
    store.apply(claim(), deleted=True)
    assert before == [claim()]


MODES = st.lists(st.sampled_from(["RWO", "ROX", "RWX"]), max_size=3).map(tuple)
CLAIMS = st.builds(
    claim,
    name=st.sampled_from("abc"),
    uid=st.sampled_from("12"),
    class_name=st.sampled_from(["fast", "slow", None]),
    access_modes=MODES,
    volume_mode=st.sampled_from(["Filesystem", "Block"]),
    resource_version=st.uuids().map(str),
)
STEPS = st.one_of(
    st.tuples(st.just("replace"), st.lists(CLAIMS, max_size=4)),
    st.tuples(st.just("apply"), CLAIMS),
    st.tuples(st.just("delete"), CLAIMS),
)


def expected_index(objects: dict[str, Claim], name: str) -> dict[str, set[str]]:
    index: dict[str, set[str]] = {}
    for key, item in objects.items():
        for value in INDEXES[name](item):
            index.setdefault(value, set()).add(key)
    return index


@given(st.lists(STEPS, max_size=12))
def test_indexes_equal_those_built_from_scratch_and_changes_replay_to_the_content(
    steps: list[tuple[str, list[Claim] | Claim]],
) -> None:
    store: Store[Claim] = Store(indexes=INDEXES, keep=kept)
    model: dict[str, Claim] = {}
    replayed: dict[str, Claim] = {}
    for what, data in steps:
        if isinstance(data, list):
            model = {item.key: item for item in data if kept(item)}
            changes = store.replace(data)
        else:
            model.pop(data.key, None)
            if what == "apply" and kept(data):
                model[data.key] = data
            changes = store.apply(data, deleted=what == "delete")
        for change in changes:
            key = (change.new or change.old or data).key  # type: ignore[union-attr]
            assert replayed.pop(key, None) == change.old
            if change.new is not None:
                assert change.old is None or change.old.uid == change.new.uid
                replayed[key] = change.new
        assert {item.key: item for item in store.values()} == model == replayed
        for name in INDEXES:
            index = expected_index(model, name)
            assert {v: set(keys) for v, keys in store._indexes[name].items()} == index
            for value, keys in index.items():
                assert {item.key for item in store.by_index(name, value)} == keys
