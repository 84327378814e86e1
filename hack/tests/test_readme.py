"""The program in the README is one that works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from external_storage.testing import ControlPlane

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0
CLASS = """
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: readme}
provisioner: example.com/hostpath
parameters: {mode: "0o750"}
"""
CLAIM = """
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data}
spec:
  storageClassName: readme
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 1Gi}}
"""


def program() -> str:
    (found,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    return str(found)


def test_the_program_is_thirty_lines_of_the_style_of_this_repository(tmp_path: Path) -> None:
    assert sum(1 for line in program().splitlines() if line.strip()) <= 30
    file = tmp_path / "hostpath.py"
    file.write_text(program())
    config = ("--no-cache", "--config", str(ROOT / "pyproject.toml"))
    for command in (("check",), ("format", "--check")):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *config, str(file)],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_program_makes_and_deletes_volumes(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    root = tmp_path / "volumes"
    root.mkdir()
    (tmp_path / "hostpath.py").write_text(program())
    command = [sys.executable, "hostpath.py", "--root", str(root)]
    command += ["--kubeconfig", str(control_plane.kubeconfig)]
    process = subprocess.Popen(command, cwd=tmp_path)
    wait = (f"--timeout={LIMIT_S:g}s",)
    claim = ("pvc/data", "--namespace", namespace)
    kubectl = control_plane.kubectl
    try:
        kubectl("apply", "-f", "-", input=CLASS)
        kubectl("apply", "--namespace", namespace, "-f", "-", input=CLAIM)
        kubectl("wait", "--for=jsonpath={.status.phase}=Bound", *claim, *wait, limit_s=2 * LIMIT_S)
        (directory,) = root.iterdir()
        assert directory.stat().st_mode & 0o7777 == 0o750
        kubectl("delete", *claim, "--wait=false")
        kubectl("wait", "--for=delete", f"pv/{directory.name}", *wait, limit_s=2 * LIMIT_S)
        assert not list(root.iterdir())
        process.terminate()
        assert process.wait(LIMIT_S) == 0
    finally:
        process.kill()
        process.wait()
