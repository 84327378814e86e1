"""What hack/e2e refuses, before anything is installed or started."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nosuch",), "nosuch: no package with scenarios; there are: "),
        (("lib",), "no package with scenarios"),
        (("--kubeconfig", "/nowhere", "nfs"), "--kubeconfig /nowhere: there is no such file"),
        (("--kubeconfig",), "--kubeconfig: a value must follow"),
        (("--image", "nfs"), "--image nfs: want NAME=REFERENCE"),
        (("--nfs-export", "server"), "--nfs-export server: want SERVER:/PATH"),
        (("--iscsi-storage", "/nowhere"), "--iscsi-storage /nowhere: has no servers.yaml"),
        (("--fast",), "--fast: no such option"),
    ],
)
def test_bad_arguments_are_told(copy: Any, arguments: tuple[str, ...], words: str) -> None:
    done = copy.run("hack/e2e", *arguments)
    assert done.returncode == 1
    assert words in done.stderr
