"""The provisioner on its own, without a control plane: what each call does to the back end."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from external_storage import (
    CannotStart,
    Context,
    Deadline,
    PersistentVolume,
    Problems,
    ProvisioningFailed,
    ProvisionRequest,
)
from external_storage.assets import AssetState
from external_storage.metrics import Metrics
from external_storage.testing import builders
from new_store_provisioner.provisioner import NewStoreProvisioner
from new_store_provisioner.settings import NewStoreParameters, NewStoreSettings

CONTEXT = Context(
    name=builders.PROVISIONER,
    namespace="default",
    # Neither is used by this back end.
    client=cast(Any, None),
    events=cast(Any, None),
    metrics=Metrics(),
)


def build(root: Path) -> NewStoreProvisioner:
    texts = {"provisioner_name": builders.PROVISIONER, "volume_root": str(root)}
    return NewStoreProvisioner(NewStoreSettings.from_texts(texts), CONTEXT)


@pytest.fixture
def provisioner(tmp_path: Path) -> Iterator[NewStoreProvisioner]:
    made = build(tmp_path)
    made.start()
    yield made
    made.stop()


def request(gid: int | None = None) -> ProvisionRequest[NewStoreParameters]:
    claim = builders.claim()
    return ProvisionRequest(
        volume_name=f"pvc-{claim.uid}",
        claim=claim,
        storage_class=builders.storage_class(),
        parameters=NewStoreParameters(gid=gid),
        capacity=1 << 30,
        selected_node=None,
        deadline=Deadline(float("inf")),
    )


def volume(name: str, path: Path) -> PersistentVolume:
    """The volume as the library saves it."""
    fields = {"metadata": {"name": name}, "spec": {"hostPath": {"path": str(path)}}}
    return msgspec.convert(fields, PersistentVolume)


def directory_of(provisioner: NewStoreProvisioner, name: str) -> Path:
    return provisioner.settings.volume_root / name


def test_a_volume_is_an_empty_directory_of_its_group(provisioner: NewStoreProvisioner) -> None:
    asked = request(os.getgid())
    made = provisioner.provision(asked)
    path = directory_of(provisioner, asked.volume_name)
    assert made.source == {"hostPath": {"path": str(path), "type": "Directory"}}
    assert made.gid == os.getgid()
    assert list(path.iterdir()) == []
    assert stat.S_IMODE(path.stat().st_mode) == 0o2770


def test_without_a_group_everybody_can_write(provisioner: NewStoreProvisioner) -> None:
    asked = request()
    assert provisioner.provision(asked).gid is None
    mode = directory_of(provisioner, asked.volume_name).stat().st_mode
    assert stat.S_IMODE(mode) == 0o2777


def test_called_again_it_finds_its_own_work(provisioner: NewStoreProvisioner) -> None:
    asked = request()
    first = provisioner.provision(asked)
    path = directory_of(provisioner, asked.volume_name)
    path.chmod(0o700)  # as a crash between mkdir and chmod leaves it
    assert provisioner.provision(asked) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o2777


def test_the_record_is_there_before_the_directory(provisioner: NewStoreProvisioner) -> None:
    asked = request()
    directory_of(provisioner, asked.volume_name).write_text("in the way")
    with pytest.raises(ProvisioningFailed, match="no directory can be made"):
        provisioner.provision(asked)
    record = provisioner.records.get(asked.volume_name)
    assert record is not None
    assert (record.state, record.claim_uid) == (AssetState.PROVISIONING, asked.claim.uid)


def test_a_link_in_the_place_of_a_volume_is_not_followed(
    provisioner: NewStoreProvisioner, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "file").touch()
    asked = request()
    path = directory_of(provisioner, asked.volume_name)
    path.symlink_to(elsewhere)
    with pytest.raises(ProvisioningFailed):
        provisioner.provision(asked)
    provisioner.delete(volume(asked.volume_name, path))
    assert not path.is_symlink()
    assert (elsewhere / "file").exists()


def test_delete_removes_everything_and_twice_is_a_success(
    provisioner: NewStoreProvisioner,
) -> None:
    asked = request()
    provisioner.provision(asked)
    path = directory_of(provisioner, asked.volume_name)
    (path / "below").mkdir()
    (path / "below" / "file").touch()
    for _ in range(2):
        provisioner.delete(volume(asked.volume_name, path))
        assert not path.exists()
        assert provisioner.records.all() == []


def test_a_volume_with_another_path_is_not_deleted(
    provisioner: NewStoreProvisioner, tmp_path: Path
) -> None:
    asked = request()
    provisioner.provision(asked)
    with pytest.raises(ProvisioningFailed, match="nothing is removed"):
        provisioner.delete(volume(asked.volume_name, tmp_path.parent / asked.volume_name))
    assert directory_of(provisioner, asked.volume_name).is_dir()


def test_what_was_begun_can_be_discarded(provisioner: NewStoreProvisioner) -> None:
    asked = request()
    provisioner.provision(asked)
    record = provisioner.records.get(asked.volume_name)
    assert record is not None
    provisioner.discard(record)
    assert not directory_of(provisioner, asked.volume_name).exists()
    assert provisioner.records.all() == []


def test_a_missing_root_is_told_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="--volume-root"):
        build(tmp_path / "missing").start()
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("root", ["/", "relative/path"])
def test_a_bad_root_is_refused(root: str) -> None:
    with pytest.raises(Problems, match="--volume-root"):
        build(Path(root))


@pytest.mark.parametrize("gid", ["0", "-1", "4294967295", "staff"])
def test_a_bad_gid_is_refused(gid: str) -> None:
    with pytest.raises(Problems, match="'gid'"):
        NewStoreParameters.from_class({"gid": gid})
