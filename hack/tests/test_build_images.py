"""What hack/build-images refuses, before anything is built."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nosuch",), "nosuch: no package with a Dockerfile; there are: "),
        (("lib",), "no package with a Dockerfile"),
        (("--tool", "tar", "nfs"), "want docker, podman or buildah"),
        (("--tool",), "--tool: a value must follow"),
        (("--fast",), "--fast: no such option"),
    ],
)
def test_bad_arguments_are_told(copy: Any, arguments: tuple[str, ...], words: str) -> None:
    done = copy.run("hack/build-images", *arguments)
    assert done.returncode == 1
    assert words in done.stderr
