"""Templates: one pass, and never a path that is not strictly below its base."""

from __future__ import annotations

import os

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from external_storage import PersistentVolumeClaim
from external_storage.path_template import BadExpansion, BadTemplate, PathTemplate, Template

VOLUME = "pvc-1234"


def claim(
    *, labels: dict[str, str] | None = None, annotations: dict[str, str] | None = None
) -> PersistentVolumeClaim:
    metadata = {
        "name": "data",
        "namespace": "team-a",
        "uid": "1234",
        "labels": labels or {},
        "annotations": annotations or {},
    }
    return msgspec.convert({"metadata": metadata}, PersistentVolumeClaim)


def path(text: str, **values: str) -> str:
    """The path for a claim with these annotations."""
    return PathTemplate.parse(text).path(claim(annotations=values), volume_name=VOLUME)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("${.PVC.namespace}-${.PVC.name}-${.PV.name}", "team-a-data-pvc-1234"),
        ("${.PVC.namespace}/${.PVC.uid}", "team-a/1234"),
        ("${.PVC.labels.app}", "shop"),
        ("${.PVC.labels.app.kubernetes.io/part-of}", "web"),
        ("${.PVC.annotations.nfs.io/storage-path}", "a/b"),
        ("x${.PVC.labels.team:-none}y", "xnoney"),
        ("${.PVC.labels.app:-none}", "shop"),
        ("${.PVC.labels.empty:-none}", "none"),
        ("${.PVC.namespace}/${.PVC.labels.team:-no/one}", "team-a/no/one"),
        ("${.PVC.namespace}${.PVC.labels.team:-}", "team-a"),
    ],
)
def test_fields_are_filled_in(text: str, expected: str) -> None:
    made = claim(
        labels={"app": "shop", "app.kubernetes.io/part-of": "web", "empty": ""},
        annotations={"nfs.io/storage-path": "a/b"},
    )
    assert PathTemplate.parse(text).path(made, volume_name=VOLUME) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("${.PVC.nam}", "${.PVC.nam} is not known; there are ${.PVC.name}"),
        ("${.PVC.labels.}", "is not known"),
        ("${.PV.uid}", "is not known"),
        ("${pvc.metadata.name}", "is not known"),
        ("${.PVC.labels.a b}", "'a b' is no key"),
        ("${.PVC.labels.a/b/c}", "'a/b/c' is no key"),
        ("${.PVC.name", "the $ at 0 begins no field"),
        ("a$b", "the $ at 1 begins no field"),
        ("a$", "the $ at 1 begins no field"),
        ("${.PVC.labels.a:-${.PVC.name}}", "a field within a field"),
        ("${.PVC.name:-x}", "is always there"),
        ("", "an empty path"),
        ("/${.PVC.name}", "is absolute"),
        ("${.PVC.name}/", "an empty segment"),
        ("a//${.PVC.name}", "an empty segment"),
        ("../${.PVC.name}", "'..'"),
        ("./${.PVC.name}", "'.'"),
        ("a\nb", "control character"),
        ("a/${.PVC.labels.b:-..}", "'..'"),
        ("a/${.PVC.labels.b:-}", "an empty segment"),
        ("x" * 256, "at most 255"),
        (".ours/${.PVC.name}", "'.ours' is reserved"),
    ],
)
def test_a_bad_template_is_told_before_there_is_a_claim(text: str, said: str) -> None:
    with pytest.raises(BadTemplate) as caught:
        PathTemplate.parse(text, reserved={".ours"})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("../../x", "'..'"),
        ("..", "'..'"),
        (".", "'.'"),
        ("/", "is absolute"),
        ("a//b", "an empty segment"),
        ("a/./b", "'.'"),
        ("a/b/..", "'..'"),
        ("a/", "an empty segment"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("x" * 300, "at most 255"),
        ("/".join(["x" * 200] * 25), "at most 4096"),
        ("", "no annotation 'p'"),
        (".ours", "reserved"),
        (".OURS", "reserved"),
        (".ours/volumes", "reserved"),
    ],
)
def test_a_value_that_would_leave_the_base_is_refused(value: str, said: str) -> None:
    template = PathTemplate.parse("${.PVC.annotations.p}", reserved={".ours"})
    with pytest.raises(BadExpansion) as caught:
        template.path(claim(annotations={"p": value}), volume_name=VOLUME)
    assert said in str(caught.value)


@pytest.mark.parametrize("value", ["..", ".", "/", "/x", "../other-team/x"])
def test_a_value_after_a_prefix_stays_below_it(value: str) -> None:
    with pytest.raises(BadExpansion):
        path("${.PVC.namespace}/${.PVC.annotations.p}", p=value)


def test_values_that_join_into_dots_are_refused() -> None:
    with pytest.raises(BadExpansion, match=r"'\.\.'"):
        path("${.PVC.annotations.p}${.PVC.annotations.q}/x", p=".", q=".")


def test_a_missing_key_is_named_with_what_helps() -> None:
    with pytest.raises(BadExpansion, match=r"no label 'team'.*\$\{\.PVC\.labels\.team:-DEFAULT\}"):
        path("${.PVC.labels.team}")


def test_a_value_that_looks_like_a_field_is_not_filled_again() -> None:
    assert path("${.PVC.annotations.p}", p="${.PVC.name}") == "${.PVC.name}"
    assert path("${.PVC.annotations.p}${.PVC.annotations.q}", p="${", q=".PVC.name}") == (
        "${.PVC.name}"
    )


_KEYS = st.sampled_from(["p", "q", "example.com/path"])
_PIECES = st.one_of(
    st.text(alphabet="ab./-_${}:", max_size=6),
    st.sampled_from(["${.PVC.name}", "${.PVC.namespace}", "${.PVC.uid}", "${.PV.name}"]),
    _KEYS.map(lambda key: f"${{.PVC.annotations.{key}}}"),
    _KEYS.map(lambda key: f"${{.PVC.labels.{key}:-x}}"),
)
_VALUES = st.dictionaries(
    _KEYS, st.one_of(st.text(max_size=300), st.text(alphabet="./a\0\n$", max_size=8)), max_size=3
)


@given(pieces=st.lists(_PIECES, max_size=5), labels=_VALUES, annotations=_VALUES)
@example(pieces=["${.PVC.annotations.p}"], labels={}, annotations={"p": ".."})
def test_whatever_is_filled_in_the_path_is_strictly_below_its_base(
    pieces: list[str], labels: dict[str, str], annotations: dict[str, str]
) -> None:
    made = claim(labels=labels, annotations=annotations)
    try:
        relative = PathTemplate.parse("".join(pieces), reserved={".ours"}).path(
            made, volume_name=VOLUME
        )
    except (BadTemplate, BadExpansion):
        return
    # Not normalised by us: what the kernel would walk is what was checked.
    assert os.path.normpath(f"/base/{relative}") == f"/base/{relative}"
    assert not any(ord(character) < 32 or ord(character) == 127 for character in relative)
    assert relative.split("/")[0] not in ("", ".", "..", ".ours")
    assert all(len(os.fsencode(part)) <= 255 for part in relative.split("/"))


@given(value=st.text(min_size=1))
def test_one_pass_gives_every_value_back_as_it_was(value: str) -> None:
    template = Template.parse("<${.PVC.annotations.p}|${.PVC.labels.q:-d}>")
    filled = template.fill(claim(annotations={"p": value}), volume_name=VOLUME)
    assert filled == f"<{value}|d>"


@given(text=st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        template = Template.parse(text)
    except BadTemplate:
        return
    if template.is_constant:
        assert template.fill(claim(), volume_name=VOLUME) == text
