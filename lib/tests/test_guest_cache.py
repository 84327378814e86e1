"""What is kept of the guest's images, and for how long."""

from __future__ import annotations

import os
import time
from pathlib import Path

from external_storage.testing.guest.image import building, prune

DAY_S = 86400.0


def make(path: Path, *, days: float) -> None:
    if path.suffix == ".tar":
        path.touch()
    else:
        path.mkdir()
        (path / "root.ext4").touch()
    used = time.time() - days * DAY_S
    os.utime(path, (used, used))


def test_other_versions_are_kept_for_two_weeks_and_what_was_cut_off_for_a_day(
    tmp_path: Path,
) -> None:
    for name, days in (
        *(("image-new", 0), ("image-used", 13), ("image-old", 15)),
        *(("image-going.partial", 0.5), ("image-cut.partial", 2)),
        *(("packages-old.tar", 15), ("site-packages", 15)),
    ):
        make(tmp_path / name, days=days)
    (tmp_path / "image-old.lock").touch()
    prune(tmp_path / "image-new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "image-going.partial",
        "image-new",
        "image-old.lock",
        "image-used",
        "packages-old.tar",
        "site-packages",
    ]
    prune(tmp_path / "packages-new.tar")
    assert not (tmp_path / "packages-old.tar").exists()


def test_they_are_looked_through_when_a_new_one_is_built(tmp_path: Path) -> None:
    make(tmp_path / "image-old", days=15)
    with building(tmp_path / "image-new") as wanted:
        assert wanted
        make(tmp_path / "image-new", days=0)
    assert not (tmp_path / "image-old").exists()
    make(tmp_path / "image-older", days=20)
    with building(tmp_path / "image-new") as wanted:
        assert not wanted
    assert (tmp_path / "image-older").exists()
