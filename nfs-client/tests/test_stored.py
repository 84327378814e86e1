"""What stands on a volume."""

from __future__ import annotations

import msgspec
import pytest

from external_storage import PersistentVolume
from nfs_client_provisioner.parameters import OnDelete
from nfs_client_provisioner.stored import BASE, ON_DELETE, PATH, RETENTION, BadStored, Stored

STORED = Stored(base="/e", path="ns/x", on_delete=OnDelete.ARCHIVE, archive_retention_s=86400.0)


def volume(annotations: dict[str, str]) -> PersistentVolume:
    return msgspec.convert({"metadata": {"annotations": annotations}}, PersistentVolume)


def test_what_is_stored_is_read_back() -> None:
    assert Stored.from_volume(volume(STORED.annotations())) == STORED


def test_a_volume_of_nfs_subdir_has_nothing_stored() -> None:
    assert Stored.from_volume(volume({"pv.kubernetes.io/provisioned-by": "x"})) is None


def test_an_admin_may_change_the_policy_on_the_volume() -> None:
    changed = STORED.annotations() | {ON_DELETE: "Retain"}
    found = Stored.from_volume(volume(changed))
    assert found is not None
    assert found.on_delete is OnDelete.RETAIN


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({BASE: ""}, f"no annotation {BASE}"),
        ({PATH: "", BASE: ""}, f"no annotation {BASE}, {PATH}"),
        ({ON_DELETE: "keep"}, "'keep' is not one of: delete, retain, archive"),
        ({RETENTION: "-1"}, "not a number of seconds"),
        ({RETENTION: "nan"}, "not a number of seconds"),
    ],
)
def test_annotations_that_cannot_be_understood_are_told(changed: dict[str, str], said: str) -> None:
    with pytest.raises(BadStored, match=said):
        Stored.from_volume(volume(STORED.annotations() | changed))
