"""A place that NFS cannot serve is told at the start, and not by the first claim."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nfs_provisioner import file_handles


def test_a_directory_on_a_disk_can_be_served(tmp_path: Path) -> None:
    assert file_handles.problem(tmp_path) is None


def test_a_file_system_without_handles_is_named() -> None:
    found = file_handles.problem(Path("/proc"))
    assert found is not None
    assert found.startswith("/proc: files cannot be opened by handle")
    assert "its file system has no handles" in found


@pytest.mark.parametrize("call", ["name_to_handle_at", "open_by_handle_at"])
def test_a_refusal_by_the_container_says_what_to_change(call: str, tmp_path: Path) -> None:
    refused = f"inject={call}:error=EPERM"
    code = (
        "import pathlib; from nfs_provisioner import file_handles; "
        f"print(file_handles.problem(pathlib.Path({str(tmp_path)!r})))"
    )
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", refused, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "DAC_READ_SEARCH is missing, or the seccomp profile" in done.stdout
