"""What ``provision`` makes on a share, and what it refuses."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from external_storage import Infeasible, ProvisioningFailed, Unchanged

BY_ANNOTATION = "${.PVC.annotations.p}"


def facts(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


def test_the_default_directory_has_the_name_that_nfs_subdir_gives(site: Any) -> None:
    request = site.request("data", namespace="team-a")
    volume = site.provision(request)
    assert site.found() == [f"team-a-data-{request.volume_name}"]
    assert volume.spec.nfs.server == "nfs.example.com"
    assert volume.spec.nfs.path == f"/exports/share/team-a-data-{request.volume_name}"
    assert list(site.directory(volume).iterdir()) == []


def test_each_volume_gets_a_group_of_its_own_by_default(site: Any) -> None:
    gids = set()
    for name in ("a", "b"):
        volume = site.provision(site.request(name))
        gid = int(volume.metadata.annotations["pv.beta.kubernetes.io/gid"])
        assert facts(site.directory(volume)) == (os.geteuid(), gid, 0o2770)
        gids.add(gid)
    assert len(gids) == 2
    assert min(gids) >= 2000


def test_without_a_group_everybody_may_write_as_with_nfs_subdir(site: Any) -> None:
    volume = site.provision(site.request(gid="none"))
    assert facts(site.directory(volume))[2] == 0o777
    assert "pv.beta.kubernetes.io/gid" not in volume.metadata.annotations


def test_owner_and_mode_come_from_the_class_and_from_patterns(site: Any) -> None:
    volume = site.provision(
        site.request(
            annotations={"uid": "1234"}, gid="4321", uid="${.PVC.annotations.uid}", mode="0750"
        )
    )
    assert facts(site.directory(volume)) == (1234, 4321, 0o750)
    assert volume.metadata.annotations["pv.beta.kubernetes.io/gid"] == "4321"


def test_called_again_it_finds_its_own_work_and_its_group(
    site: Any, site_on: Callable[..., Any], share: Path
) -> None:
    request = site.request()
    first = site.provision(request, save=False)
    assert site.provision(request, save=False) == first
    site.provisioner.stop()
    # After a restart nobody but the record knows the group; another claim must not get it.
    again = site_on(share)
    other = again.provision(again.request("other"), save=False)
    assert again.provision(request, save=False) == first
    key = "pv.beta.kubernetes.io/gid"
    assert other.metadata.annotations[key] != first.metadata.annotations[key]


@pytest.mark.parametrize(
    "value",
    [
        "../../x",
        "..",
        ".",
        "/",
        "a//b",
        "a/./b",
        "a/",
        "a\0b",
        "a\nb",
        "x" * 300,
        "/".join(["x" * 200] * 25),
        ".external-storage",
        ".external-storage/records",
        ".External-Storage",
    ],
)
def test_n17_a_value_that_would_leave_the_base_is_refused_and_nothing_is_made(
    site: Any, value: str
) -> None:
    request = site.request(annotations={"p": value}, pathPattern=BY_ANNOTATION)
    with pytest.raises((Infeasible, ProvisioningFailed)):
        site.provisioner.provision(request)
    assert (site.found(), site.records()) == ([], [])


def test_n18_a_missing_key_is_refused_unless_the_class_has_a_default(site: Any) -> None:
    pattern = "${.PVC.labels.team}/${.PVC.name}"
    with pytest.raises(Infeasible, match="no label 'team'"):
        site.provisioner.provision(site.request(pathPattern=pattern))
    with pytest.raises(Infeasible, match="no label 'team', or an empty one"):
        site.provisioner.provision(site.request(labels={"team": ""}, pathPattern=pattern))
    assert site.found() == []
    pattern = "${.PVC.labels.team:-none}/${.PVC.name}"
    assert site.directory(site.provision(site.request(pathPattern=pattern))).is_dir()
    assert site.found() == ["none"]


def test_n18_a_value_that_looks_like_a_field_is_not_filled_in(site: Any) -> None:
    annotations = {"p": "${.PVC.name}"}
    site.provision(site.request(annotations=annotations, pathPattern=BY_ANNOTATION))
    assert site.found() == ["${.PVC.name}"]


class Saved:
    """The API server, asked for volumes."""

    def __init__(self, *names: str) -> None:
        self.names = set(names)

    def find(self, _kind: object, name: str) -> str | None:
        return name if name in self.names else None


def test_n19_the_second_claim_of_one_path_is_refused(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = Saved("pvc-ns-a")
    monkeypatch.setattr(site.provisioner, "context", replace(site.provisioner.context, client=api))
    first = site.provision(site.request("a", pathPattern="same"))
    (site.directory(first) / "file").touch()
    with pytest.raises(ProvisioningFailed, match="'same' is that of volume pvc-ns-a"):
        site.provisioner.provision(site.request("b", pathPattern="same"))
    for pattern in ("same/below", "same"):
        with pytest.raises(ProvisioningFailed):
            site.provisioner.provision(site.request("b", pathPattern=pattern, shared="true"))
    assert site.records() == ["pvc-ns-a"]


def test_n19_a_shared_directory_stays_until_its_last_volume_is_gone(site: Any) -> None:
    shared = {"pathPattern": "both", "shared": "true", "onDelete": "delete"}
    volumes = [site.provision(site.request(name, **shared)) for name in ("a", "b")]
    gids = {v.metadata.annotations["pv.beta.kubernetes.io/gid"] for v in volumes}
    assert len(gids) == 1
    (site.directory(volumes[0]) / "file").touch()
    site.provisioner.delete(volumes[0])
    assert (site.share / "both" / "file").exists()
    assert site.records() == ["pvc-ns-b"]
    site.provisioner.delete(volumes[1])
    assert (site.found(), site.records()) == ([], [])


def test_n19_claims_that_are_made_together_share_the_group_of_the_first(site: Any) -> None:
    """Each looks for a holder before any of them has made the directory."""
    together = threading.Barrier(4)
    company = site.provisioner._groups.reserve

    @contextlib.contextmanager
    def reserve(*args: Any, **kwargs: Any) -> Any:
        with company(*args, **kwargs) as gid:
            together.wait(60)
            yield gid

    shared = {"pathPattern": "both", "shared": "true", "onDelete": "delete"}
    requests = [site.request(name, **shared) for name in "abcd"]
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as threads:
        patch.setattr(site.provisioner._groups, "reserve", reserve)
        volumes = list(threads.map(site.provision, requests))
    gid = str((site.share / "both").stat().st_gid)
    assert {v.metadata.annotations["pv.beta.kubernetes.io/gid"] for v in volumes} == {gid}
    for volume in volumes:
        site.provisioner.delete(volume)
    # The groups that were taken in vain are free again, and so is theirs.
    assert len(site.provisioner._groups._allocator) == 0


@pytest.mark.parametrize("again", [False, True])
def test_a_volume_gets_the_group_of_the_directory_that_it_joins(site: Any, again: bool) -> None:
    """Also in a second try, when its record is there; and of a class with other groups."""
    shared = {"pathPattern": "both", "shared": "true"}
    site.provision(site.request("a", gid="4711", **shared))
    for gid in ("auto", "12"):
        request = site.request(f"b-{gid}", gid=gid, **shared)
        for _ in range(1 + again):
            volume = site.provision(request, save=False)
            assert volume.metadata.annotations["pv.beta.kubernetes.io/gid"] == "4711"


def test_n20_a_directory_that_is_there_is_refused_unless_the_class_adopts(site: Any) -> None:
    there = site.share / "old"
    there.mkdir(mode=0o705)
    there.chmod(0o705)
    os.chown(there, 1111, 2222)
    (there / "file").write_text("kept")
    with pytest.raises(ProvisioningFailed):
        site.provisioner.provision(site.request(pathPattern="old"))
    assert site.records() == []
    volume = site.provision(site.request(pathPattern="old", adopt="true", mode="0777", uid="7"))
    assert facts(there) == (1111, 2222, 0o705)
    assert (there / "file").read_text() == "kept"
    assert volume.metadata.annotations["pv.beta.kubernetes.io/gid"] == "2222"


def test_n20_pods_get_the_group_of_an_adopted_directory_whatever_the_class_says(site: Any) -> None:
    (site.share / "old").mkdir(mode=0o2770)
    os.chown(site.share / "old", 1111, 2222)
    request = site.request(pathPattern="old", adopt="true", gid="none")
    volume = site.provision(request, save=False)
    assert volume.metadata.annotations["pv.beta.kubernetes.io/gid"] == "2222"


def test_n20_the_directory_of_a_volume_that_was_deleted_by_hand_can_be_adopted(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retained, as volumes of nfs-subdir were reused by a pattern without the volume's name."""
    api = Saved("pvc-ns-a")
    monkeypatch.setattr(site.provisioner, "context", replace(site.provisioner.context, client=api))
    first = site.provision(site.request("a", pathPattern="data"))
    (site.directory(first) / "file").write_text("precious")
    site.vanishes(first)
    # Somebody may be faster than the watch: the API server has the last word.
    with pytest.raises(ProvisioningFailed, match=r"belongs to the volume pvc-ns-a$"):
        site.provision(site.request("b", pathPattern="data", adopt="true"))
    api.names.clear()
    with pytest.raises(ProvisioningFailed, match=r'pvc-ns-a, whose .* is gone: .* adopt: "true"'):
        site.provision(site.request("b", pathPattern="data"))
    second = site.provision(site.request("b", pathPattern="data", adopt="true"))
    assert site.directory(second) == site.directory(first)
    assert (site.directory(second) / "file").read_text() == "precious"
    assert site.records() == ["pvc-ns-b"]
    site.provisioner.delete(second)
    assert [name.startswith("archived-data") for name in site.found()] == [True]


@pytest.mark.parametrize("pattern", ["link", "link/below"])
def test_n21_a_planted_link_is_not_followed(site: Any, tmp_path: Path, pattern: str) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir(mode=0o700)
    (site.share / "link").symlink_to(target)
    for adopt in ("false", "true"):
        with pytest.raises(ProvisioningFailed):
            site.provisioner.provision(site.request(pathPattern=pattern, adopt=adopt))
    assert list(target.iterdir()) == []
    assert facts(target)[2] == 0o700


def test_overcommit_refuses_what_is_above_the_limit(site_on: Any, share: Path) -> None:
    size = os.statvfs(share).f_blocks * os.statvfs(share).f_frsize
    site = site_on(share, overcommit=1)
    first = site.provision(site.request("a", capacity=size - 10))
    with pytest.raises(ProvisioningFailed, match="server 'one' has promised"):
        site.provisioner.provision(site.request("b", capacity=11))
    assert site.records() == ["pvc-ns-a"]
    site.provision(site.request("c", capacity=10))
    with pytest.raises(ProvisioningFailed):
        site.provisioner.expand(first, size)
    site.provisioner.delete(first)
    site.provision(site.request("b", capacity=11))


def test_overcommit_warns_where_it_is_only_to_warn(site_on: Any, share: Path) -> None:
    site = site_on(share, overcommit=0.000001, overcommitAction="warn")
    site.provision(site.request("a", capacity=1 << 40))
    assert "Overcommitted" in site.told.reasons("a")


def test_users_are_told_once_that_the_size_is_not_enforced(site: Any) -> None:
    volume = site.provision(site.request("a"))
    site.provision(site.request("b"))
    assert (site.told.reasons("a"), site.told.reasons("b")) == (["SizeNotEnforced"], [])
    assert site.provisioner.expand(volume, 1 << 30).capacity == 1 << 30
    assert site.told.reasons("a") == ["SizeNotEnforced"] * 2


def test_an_unknown_server_is_refused_with_those_there_are(site: Any) -> None:
    with pytest.raises(Infeasible, match="no server 'two'; there are: one"):
        site.provisioner.provision(site.request(server="two"))
    site.provision(site.request(server="one"))


@pytest.mark.parametrize(
    "keys", [{"source": "nfs.example.com:/exports/share"}, {"fsTypes": ["nfs", "nfs4"]}]
)
def test_nothing_is_made_on_a_local_disk_where_a_share_should_be(
    site_on: Any, share: Path, keys: dict[str, Any]
) -> None:
    site = site_on(share, **keys)
    with pytest.raises(Unchanged, match="share 'one'"):
        site.provisioner.provision(site.request())
    assert "share 'one'" in site.provisioner.check()
    assert list(share.iterdir()) == []
