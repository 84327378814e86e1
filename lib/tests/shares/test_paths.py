"""Which volume has which directory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from external_storage.shares.paths import Paths

NAMES = st.sampled_from(["v1", "v2", "v3", "v4"])
PARTS = st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=3).map(tuple)
STEPS = st.lists(st.tuples(NAMES, PARTS, st.booleans()) | NAMES, max_size=20)


def is_above(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    return len(one) < len(other) and other[: len(one)] == one


@given(steps=STEPS, name=NAMES, parts=PARTS, shared=st.booleans())
def test_a_conflict_is_told_exactly_when_there_is_one(
    steps: list[tuple[str, tuple[str, ...], bool] | str],
    name: str,
    parts: tuple[str, ...],
    shared: bool,
) -> None:
    paths, model = Paths(), dict[str, tuple[tuple[str, ...], bool]]()
    for step in steps:
        if isinstance(step, str):
            paths.drop(step)
            model.pop(step, None)
        else:
            paths.put(step[0], step[1], shared=step[2])
            model[step[0]] = step[1:]
    others = [held for holder, held in model.items() if holder != name]
    wanted = any(
        is_above(held, parts)
        or is_above(parts, held)
        or (held == parts and not (shared and shares))
        for held, shares in others
    )
    assert (paths.conflict(name, parts, shared=shared) is not None) == wanted
    assert dict(paths.at(parts)) == {n: s for n, (p, s) in model.items() if p == parts}
