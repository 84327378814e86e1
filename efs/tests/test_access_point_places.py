"""Whose directory is whose: no access point leads into another volume's, or has one within."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from tests.access_points import Rig, request, saved

from external_storage import ProvisioningFailed

if TYPE_CHECKING:
    from tests.faulty_efs import FaultyEfs


def shared(name: str, path: str = "shared", **given: Any) -> Any:
    return request(name, subPathPattern=path, ensureUniqueDirectory="false", **given)


@pytest.mark.parametrize("path", ["shared", "shared/below", "above"])
def test_no_access_point_leads_into_the_directory_of_another_volume(
    rig: Rig, efs: FaultyEfs, file_system: str, path: str
) -> None:
    first = shared("one", "above/shared" if path == "above" else "shared")
    volume = saved(first.volume_name, rig.provision(first))
    for process in (rig, Rig(efs, file_system)):
        with pytest.raises(ProvisioningFailed, match=r"volume pvc|access points lead"):
            process.provision(shared("two", path))
    assert len(efs.access_points()) == 1
    assert len(rig.known.gids(file_system)) == 1
    rig.known.observe(None, volume)
    rig.volumes.delete(volume)
    with pytest.raises(ProvisioningFailed, match="of volume pvc"):
        rig.provision(shared("two", path))  # until the deletion is at its end
    rig.known.observe(volume, None)
    rig.provision(shared("two", path))


def test_two_claims_at_once_never_get_one_directory(rig: Rig, efs: FaultyEfs) -> None:
    def provision(number: int) -> bool:
        try:
            rig.provision(shared(f"data-{number}"))
        except ProvisioningFailed:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(provision, range(16)))
    assert sum(done) == len(efs.access_points()) >= 1
    paths = [point["RootDirectory"]["Path"] for point in efs.access_points()]
    assert paths == ["/shared"]


def test_an_access_point_of_an_admins_for_all_is_in_nobodys_way(
    rig: Rig, efs: FaultyEfs, file_system: str
) -> None:
    efs.add_access_points(file_system, 1, first_gid=1, path="/")
    rig.provision(request())
    efs.add_access_points(file_system, 1, first_gid=2, path="/theirs")
    rig.points.refresh()
    with pytest.raises(ProvisioningFailed, match="access points lead"):
        rig.provision(shared("theirs", "theirs"))
