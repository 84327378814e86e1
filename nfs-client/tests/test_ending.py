"""What ``delete`` removes, archives or leaves alone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from external_storage import PersistentVolume, ProvisioningFailed
from external_storage.testing import builders
from nfs_client_provisioner.predecessor import policy_of_class
from nfs_client_provisioner.stored import BASE, ON_DELETE, PATH


def filled(site: Any, volume: PersistentVolume) -> Path:
    """The volume's directory, with something in it."""
    directory: Path = site.directory(volume)
    (directory / "below").mkdir()
    (directory / "below" / "file").write_text("precious")
    return directory


def changed(volume: PersistentVolume, *, path: str = "", **annotations: str) -> PersistentVolume:
    """The volume as somebody has forged it."""
    fields = msgspec.to_builtins(volume)
    fields["metadata"]["annotations"] |= annotations
    if path:
        fields["spec"]["nfs"]["path"] = path
    return msgspec.convert(fields, PersistentVolume)


def of_nfs_subdir(name: str, path: str, *, server: str = "nfs.example.com") -> PersistentVolume:
    """A volume without annotations of ours."""
    fields = {
        "metadata": {"name": name},
        "spec": {"nfs": {"server": server, "path": path}, "capacity": {"storage": "1Mi"}},
    }
    return msgspec.convert(fields, PersistentVolume)


def test_a_deleted_volume_leaves_nothing_and_twice_is_a_success(site: Any) -> None:
    volume = site.provision(site.request(pathPattern="ns/a/data", onDelete="delete"))
    filled(site, volume)
    for _ in range(2):
        site.provisioner.delete(volume)
        assert (site.found(), site.records()) == ([], [])


def test_without_its_record_a_volume_is_deleted_by_what_stands_on_it(site: Any) -> None:
    """As after a restore of the share from a backup that is older than the volume."""
    volume = site.provision(site.request(onDelete="delete"))
    filled(site, volume)
    site.provisioner.records.forget(volume.name)
    site.provisioner.delete(volume)
    assert site.found() == []


def test_a_retained_directory_stays_as_it_is(site: Any) -> None:
    volume = site.provision(site.request(onDelete="retain"))
    directory = filled(site, volume)
    site.provisioner.delete(volume)
    assert (directory / "below" / "file").read_text() == "precious"
    assert site.records() == []


@pytest.mark.parametrize("policy", ["delete", "retain", "archive"])
def test_a_volume_that_is_never_saved_leaves_nothing_and_can_be_made_again(
    site: Any, policy: str
) -> None:
    """The API server refuses it: what was made for it is undone."""
    request = site.request(pathPattern="ns/data", onDelete=policy)
    for _ in range(2):
        volume = site.provision(request, save=False)
        site.provisioner.delete(volume)
        assert (site.found(), site.records()) == ([], [])
    directory = site.directory(site.provision(request, save=False))
    (directory / "file").write_text("precious")
    site.provisioner.delete(volume)
    assert (site.found() == []) == (policy == "delete")


def test_an_unsaved_volume_does_not_take_the_directory_of_one_of_nfs_subdir_along(
    site: Any,
) -> None:
    (site.share / "same").mkdir()
    site.appears(of_nfs_subdir("pvc-old", "/exports/share/same"))
    shared = {"pathPattern": "same", "shared": "true", "adopt": "true"}
    for policy in ("delete", "retain"):
        volume = site.provision(site.request(onDelete=policy, **shared), save=False)
        site.provisioner.delete(volume)
        assert (site.found(), site.records()) == (["same"], [])


def test_a_server_that_has_never_been_read_holds_up_no_clean_up_elsewhere(
    site_on: Any, share: Path, share_entry: Any, tmp_path: Path, wait_until: Any
) -> None:
    site = site_on(share)
    absent = tmp_path / "absent"
    site.provision(site.request(pathPattern="ns/data"), save=False)
    (record,) = site.provisioner.records.all()
    two = site_on(
        share, others={"away": {**share_entry(share), "path": "/away", "mountPoint": str(absent)}}
    )
    wait_until(lambda: two.provisioner.check() is None, "the other one has been looked at")
    two.provisioner.discard(record)
    assert (site.found(), site.records()) == ([], [])


@pytest.mark.parametrize("path", [".external-storage/trash", "a\nb", "a/" + "b" * 300])
def test_n17_a_volume_with_a_path_that_none_can_have_is_refused(site: Any, path: str) -> None:
    with pytest.raises(ProvisioningFailed, match="nothing is removed"):
        site.provisioner.delete(of_nfs_subdir("pvc-old", f"/exports/share/{path}"))
    assert (site.share / ".external-storage/trash").is_dir()


def test_n26_archives_of_one_name_are_all_kept_and_are_renamed_not_copied(site: Any) -> None:
    inodes = []
    for number, namespace in enumerate(("ns1", "ns2", "ns1")):
        request = site.request(f"c{number}", pathPattern=f"{namespace}/data")
        volume = site.provision(request)
        inodes.append(filled(site, volume).stat().st_ino)
        site.provisioner.delete(volume)
    assert len(site.found()) == 3
    assert all(name.startswith("archived-ns") for name in site.found())
    assert sorted((site.share / name).stat().st_ino for name in site.found()) == sorted(inodes)


def test_n26_parents_are_removed_only_when_empty_and_never_the_base(site: Any) -> None:
    volumes = [
        site.provision(site.request(name, pathPattern=f"ns/{name}/data", onDelete="delete"))
        for name in ("a", "b")
    ]
    site.provisioner.delete(volumes[0])
    assert sorted(path.name for path in (site.share / "ns").iterdir()) == ["b"]
    site.provisioner.delete(volumes[1])
    assert site.found() == []
    assert site.share.is_dir()


@pytest.fixture
def mounted_over(site: Any) -> Iterator[PersistentVolume]:
    """A volume on whose directory somebody has mounted another file system."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    volume = site.provision(site.request(onDelete="archive"))
    directory = site.directory(volume)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)
    try:
        (directory / "file").write_text("precious")
        yield volume
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.parametrize("policy", ["archive", "delete"])
def test_n26_another_file_system_in_the_place_of_a_volume_is_an_error_without_loss(
    site: Any, mounted_over: PersistentVolume, policy: str
) -> None:
    volume = changed(mounted_over, **{ON_DELETE: policy})
    with pytest.raises(ProvisioningFailed):
        site.provisioner.delete(volume)
    assert (site.directory(volume) / "file").read_text() == "precious"
    assert site.records() == [volume.name]


@pytest.mark.parametrize("policy", ["archive", "delete"])
@pytest.mark.parametrize("planted", ["ns", "ns/data"])
def test_n21_a_link_planted_before_the_end_is_not_followed(
    site: Any, tmp_path: Path, planted: str, policy: str
) -> None:
    volume = site.provision(site.request(pathPattern="ns/data", onDelete=policy))
    target = tmp_path / "elsewhere"
    (target / "data").mkdir(parents=True)
    (target / "data" / "file").touch()
    (site.share / planted).rename(tmp_path / "moved-away")
    (site.share / planted).symlink_to(target)
    with pytest.raises(ProvisioningFailed):
        site.provisioner.delete(volume)
    assert (target / "data" / "file").exists()
    assert (site.share / planted).is_symlink()


@pytest.mark.parametrize(
    ("path", "annotations"),
    [
        ("/exports/share/other", {}),
        ("/exports/share/other", {PATH: "other"}),
        ("", {PATH: "other"}),
        ("", {PATH: "../share/other"}),
        ("", {BASE: "/exports"}),
        ("/exports/share", {PATH: "."}),
        ("/exports/share/.external-storage", {PATH: ".external-storage"}),
        ("", {ON_DELETE: "shred"}),
        ("", {ON_DELETE: ""}),
    ],
)
def test_n23_a_volume_that_says_another_thing_than_its_record_removes_nothing(
    site: Any, path: str, annotations: dict[str, str]
) -> None:
    other = site.share / "other"
    other.mkdir()
    (other / "file").touch()
    volume = site.provision(site.request(onDelete="delete"))
    directory = filled(site, volume)
    with pytest.raises((ProvisioningFailed, ValueError)):
        site.provisioner.delete(changed(volume, path=path, **annotations))
    assert (directory / "below" / "file").exists()
    assert (other / "file").exists()
    assert site.records() == [volume.name]


@pytest.mark.parametrize(
    ("server", "path"),
    [
        ("other.example.com", "/exports/share/x"),
        ("nfs.example.com", "/exports/other/x"),
        ("nfs.example.com", "/exports/share"),
        ("nfs.example.com", "/exports/share/"),
        ("nfs.example.com", "/exports/share2/x"),
        ("nfs.example.com", "/exports/share/../share/x"),
        ("nfs.example.com", "/"),
    ],
)
def test_n23_a_volume_of_another_server_or_base_is_refused(
    site: Any, server: str, path: str
) -> None:
    (site.share / "x").mkdir()
    volume = of_nfs_subdir("pvc-old", path, server=server)
    with pytest.raises(ProvisioningFailed, match="nothing is removed"):
        site.provisioner.delete(volume)
    assert site.found() == ["x"]


def test_n22_after_a_change_of_nfs_path_nothing_is_deleted_silently(
    site: Any, site_on: Any, share: Path
) -> None:
    volume = site.provision(site.request(onDelete="delete"))
    directory = filled(site, volume)
    site.provisioner.stop()
    for moved in ("/", "/exports", "/srv"):
        with pytest.raises(ProvisioningFailed, match="nothing is removed"):
            site_on(share, path=moved).provisioner.delete(volume)
    assert directory.is_dir()


@pytest.fixture
def classless(site: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The site, in a cluster that has no class any more."""

    class NoClasses:
        def find(self, *_: object) -> None:
            return None

    cluster = replace(site.provisioner.context, client=NoClasses())
    monkeypatch.setattr(site.provisioner, "context", cluster)
    return site


def test_a_volume_of_nfs_subdir_is_archived_when_its_class_is_gone(classless: Any) -> None:
    site = classless
    old = site.share / "ns-data-pvc-old"
    old.mkdir(mode=0o777)
    (old / "file").write_text("precious")
    volume = of_nfs_subdir("pvc-old", "/exports/share/ns-data-pvc-old")
    site.appears(volume)
    site.provisioner.delete(volume)
    (archive,) = site.found()
    assert archive.startswith("archived-")
    assert (site.share / archive / "file").read_text() == "precious"
    assert site.told.reasons("pvc-old") == ["ArchivedByDefault"]


@pytest.mark.parametrize(
    ("parameters", "policy"),
    [
        ({}, "archive"),
        ({"onDelete": "delete"}, "delete"),
        ({"onDelete": "retain", "archiveOnDelete": "false"}, "retain"),
        ({"archiveOnDelete": "false"}, "delete"),
        ({"archiveOnDelete": "F"}, "delete"),
        ({"archiveOnDelete": "true"}, "archive"),
        # None of these had an effect.
        ({"onDelete": "Delete"}, "archive"),
        ({"onDelete": "archive", "archiveOnDelete": "false"}, "archive"),
        ({"ondelete": "delete"}, "archive"),
        ({"archiveondelete": "false"}, "archive"),
        ({"onDelete": "delete "}, "archive"),
        ({"archiveOnDelete": "no"}, "archive"),  # an error there, for ever
        ({"archiveOnDelete": ""}, "archive"),
    ],
)
def test_the_class_of_an_old_volume_is_read_as_nfs_subdir_read_it(
    parameters: dict[str, str], policy: str
) -> None:
    class Classes:
        def find(self, *_: object) -> Any:
            return builders.storage_class(parameters=parameters)

    assert policy_of_class(cast(Any, Classes()), "any") == policy


def test_two_volumes_of_nfs_subdir_with_one_directory_keep_it_until_the_last(
    classless: Any,
) -> None:
    site = classless
    (site.share / "same").mkdir()
    volumes = [of_nfs_subdir(f"pvc-{n}", "/exports/share/same") for n in "ab"]
    for volume in volumes:
        site.appears(volume)
    site.provisioner.delete(volumes[0])
    assert site.found() == ["same"]
    site.provisioner.delete(volumes[1])
    (archive,) = site.found()
    assert archive.startswith("archived-same")


def test_the_directory_of_a_whole_namespace_is_not_removed_from_under_other_volumes(
    classless: Any,
) -> None:
    """nfs-subdir made one of an empty annotation."""
    site = classless
    outer = of_nfs_subdir("pvc-outer", "/exports/share/ns")
    inner = site.provision(site.request(pathPattern="ns/data", onDelete="delete"))
    site.appears(outer)
    with pytest.raises(ProvisioningFailed, match="below 'ns'"):
        site.provisioner.delete(outer)
    site.provisioner.delete(inner)


def test_n27_what_cannot_be_removed_is_told_and_the_rest_goes(site: Any, wait_until: Any) -> None:
    if os.geteuid() != 0:
        pytest.skip("chattr needs root")
    volume = site.provision(site.request(onDelete="delete"))
    directory = filled(site, volume)
    held = directory / "below" / "held"
    held.touch()
    if subprocess.run(["chattr", "+i", held], check=False).returncode:
        pytest.skip("the file system has no immutable files")
    try:
        site.provisioner.delete(volume)
        assert site.found() == []
        wait_until(lambda: site.provisioner.trouble(), "the trash is in trouble")
        (left,) = [p for p in site.share.rglob("*") if p.is_file() and p.name != "lock"]
        assert left.name == "held"
        assert "held" in site.provisioner.trouble()
    finally:
        for path in site.share.rglob("held"):
            subprocess.run(["chattr", "-i", path], check=True)

    def removed() -> bool:
        site.look()
        site.provisioner.reconcile([])
        return not list(site.share.rglob("held"))

    wait_until(removed, "the rest is removed")


def test_archives_whose_time_is_over_are_removed_and_others_are_not(
    site_on: Any, share: Path, wait_until: Any
) -> None:
    site = site_on(share, flags={"archive_retention": "0.001"})
    short, long = (
        site.provision(site.request(name, pathPattern=name, **keys))
        for name, keys in (("short", {}), ("long", {"archiveRetention": "24h"}))
    )
    (share / "archived-by-hand").mkdir()
    for volume in (short, long):
        site.provisioner.delete(volume)
    assert len(site.found()) == 3

    def tidied() -> bool:
        site.provisioner.reconcile([])
        return len(site.found()) == 2

    wait_until(tidied, "the archive of short is gone")
    assert [name.split("-")[1] for name in site.found()] == ["by", "long"]
