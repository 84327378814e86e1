"""Templates for the names of volumes."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from external_storage.volume_name import BadVolumeName, problems, render

UID = "0f9e8d7c-0000-4000-8000-000000000001"
LABEL = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?", fullmatch=True)
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("pvc-${.PVC.uid}", f"pvc-{UID}"),
        ("${.PVC.uid}", UID),
        ("eu1.${.PVC.namespace}-${.PVC.name}.${.PVC.uid}", f"eu1.shop-data.{UID}"),
    ],
)
def test_fields_are_filled_in(template: str, name: str) -> None:
    assert list(problems(template)) == []
    assert render(template, namespace="shop", name="data", uid=UID) == name


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("", "would not be unique"),
        ("pvc", "would not be unique"),
        ("${.PVC.namespace}-${.PVC.name}", "would not be unique"),
        ("PVC-${.PVC.uid}", "only a-z"),
        ("-${.PVC.uid}", "only a-z"),
        ("a..${.PVC.uid}", "only a-z"),
        ("${.PVC.uid}/x", "only a-z"),
        ("${.PVC.uid}-${.PVC.label}", "${.PVC.label} is not known"),
        ("${.PVC.uid}-${.PV.name}", "a $ begins no known field"),
        ("${.PVC.uid}" + "x" * 250, "longer than 253"),
    ],
)
def test_a_bad_template_is_told_why(template: str, what: str) -> None:
    assert any(what in problem for problem in problems(template)), list(problems(template))


def test_a_claim_whose_name_is_too_long_is_told_so() -> None:
    with pytest.raises(BadVolumeName, match="253 are allowed"):
        render("${.PVC.name}-${.PVC.uid}", namespace="n", name="x" * 250, uid=UID)


@given(prefix=LABEL, namespace=LABEL, name=LABEL, first=st.uuids(), second=st.uuids())
def test_names_are_valid_and_differ_with_the_claim(
    prefix: str, namespace: str, name: str, first: object, second: object
) -> None:
    assume(first != second)
    template = f"{prefix}-${{.PVC.namespace}}.${{.PVC.name}}-${{.PVC.uid}}"
    assert list(problems(template)) == []
    names = {render(template, namespace=namespace, name=name, uid=str(u)) for u in (first, second)}
    assert len(names) == 2
    assert all(SUBDOMAIN.fullmatch(made) for made in names)
