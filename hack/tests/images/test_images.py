"""Images built for real, on a base made from Debian packages; only `hack/test images` runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 1500.0
NAMES = ("nfs", "rendered-store")


def buildah(*arguments: str) -> str:
    done = subprocess.run(
        ["buildah", *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, f"{arguments}:\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module", autouse=True)
def store() -> Iterator[None]:
    """A place for images of our own; gone at the end, since it is large."""
    place = Path(tempfile.mkdtemp(prefix="external-storage-images-"))
    driver = os.environ.get("STORAGE_DRIVER", "overlay")
    lines = ["[storage]", f'driver = "{driver}"']
    lines += [f'graphroot = "{place}/store"', f'runroot = "{place}/run"']
    (place / "storage.conf").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_STORAGE_CONF", str(place / "storage.conf"))
        patch.setenv("BUILDAH_ISOLATION", "chroot")
        yield
        buildah("rm", "--all")
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def built(store: None, rendered: Any) -> None:
    command = ["hack/build-images", "--tool", "buildah", "--make-base", *NAMES]
    done = subprocess.run(
        command, cwd=rendered.root, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture
def container(built: None, request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    name: str = request.param
    made = buildah("from", f"localhost/external-storage-{name}:0.1.0")
    yield name, made
    buildah("rm", made)


on_each = pytest.mark.parametrize("container", NAMES, indirect=True)


@pytest.mark.timeout(LIMIT_S)
@on_each
def test_the_program_starts_as_the_user_of_its_image(container: tuple[str, str]) -> None:
    name, made = container
    config = json.loads(buildah("inspect", made))["OCIv1"]["config"]
    (program,) = config["Entrypoint"]
    assert config.get("User", "") == ("" if name == "nfs" else "65532:65532")
    assert "--provisioner-name" in buildah("run", made, "--", program, "--help")


@on_each
def test_nothing_of_the_build_is_left_in_it(container: tuple[str, str]) -> None:
    name, made = container
    script = f"ls -d /src /etc/pip.conf /run/secrets/* /opt/{name}-provisioner/bin/pip* || true"
    assert buildah("run", made, "--", "sh", "-c", f"({script}) 2>/dev/null") == ""
