"""Owner and mode of a new directory."""

from __future__ import annotations

import msgspec
import pytest

from external_storage import PersistentVolumeClaim
from nfs_client_provisioner.ownership import Wanted, wanted


def of(*, gid: str = "auto", uid: str = "", mode: str = "", **annotations: str) -> Wanted:
    metadata = {"name": "data", "namespace": "team-a", "annotations": annotations}
    claim = msgspec.convert({"metadata": metadata}, PersistentVolumeClaim)
    return wanted(claim, volume_name="pv", gid=gid, uid=uid, mode=mode)


@pytest.mark.parametrize(
    ("gid", "expected"),
    [
        ("auto", Wanted(uid=None, gid=None, is_auto=True, mode=0o2770)),
        ("AUTO", Wanted(uid=None, gid=None, is_auto=True, mode=0o2770)),
        ("none", Wanted(uid=None, gid=None, is_auto=False, mode=0o777)),
        ("3000", Wanted(uid=None, gid=3000, is_auto=False, mode=0o2770)),
        ("${.PVC.annotations.g}", Wanted(uid=None, gid=4000, is_auto=False, mode=0o2770)),
        ("${.PVC.annotations.no:-5000}", Wanted(uid=None, gid=5000, is_auto=False, mode=0o2770)),
    ],
)
def test_the_group_decides_the_mode(gid: str, expected: Wanted) -> None:
    assert of(gid=gid, g="4000") == expected


@pytest.mark.parametrize("mode", ["0750", "750", "0o750"])
def test_a_mode_is_octal_however_it_is_written(mode: str) -> None:
    assert of(mode=mode, uid="0") == Wanted(uid=0, gid=None, is_auto=True, mode=0o750)


@pytest.mark.parametrize(
    "value", ["0", "00", "-1", "root", "4294967295", "\N{FULLWIDTH DIGIT ONE}", "1 2", "1\n2"]
)
def test_a_pattern_cannot_give_root_or_what_is_no_number(value: str) -> None:
    for key in ("gid", "uid"):
        with pytest.raises(ValueError, match=f"parameter '{key}'"):
            of(**{key: "${.PVC.annotations.v}"}, v=value)


def test_a_missing_annotation_is_named() -> None:
    with pytest.raises(ValueError, match="parameter 'mode': the claim has no annotation 'm'"):
        of(mode="${.PVC.annotations.m}")
