"""Who has which directory of a file system, compared with looking at all of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from efs_provisioner.places import Places

paths = st.lists(st.sampled_from("ab"), max_size=4).map(lambda parts: "/" + "/".join(parts))
names = st.sampled_from("vwxyz")


@given(st.lists(st.tuples(names, st.none() | paths)), paths)
def test_who_is_in_it_and_who_is_around_it(
    changes: list[tuple[str, str | None]], path: str
) -> None:
    places, known = Places(), dict[str, str]()
    for name, to in changes:
        if to is None:
            places.drop(name)
            known.pop(name, None)
        else:
            places.put(name, to)
            known[name] = to
    whole = path.rstrip("/") + "/"
    each = {name: other.rstrip("/") + "/" for name, other in known.items()}
    assert places.within(path) == {n for n, other in each.items() if other.startswith(whole)}
    assert places.around(path) == {
        n for n, other in each.items() if whole.startswith(other) and other not in ("/", whole)
    }
    assert len(places) == len(known)
    assert all(name in places for name in known)


def test_names_are_compared_whole() -> None:
    places = Places()
    places.put("volume", "/data2/x")
    assert places.within("/data") == places.around("/data2/xy") == set()
