"""Small container images made here, from the machine's own static busybox; no tool, no registry.

``PAUSE_IMAGE`` holds a pod's namespaces; ``TOOLS_IMAGE`` has a shell and the usual commands, for
pods that write and read.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from external_storage.testing.cluster import layout
from external_storage.testing.cluster.requirements import ClusterError, find

_BUSYBOX: Final = "bin/busybox"
_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
_MACHINES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


OWN: Final[Mapping[str, Sequence[str]]] = {
    layout.PAUSE_IMAGE: ("/bin/busybox", "sleep", "infinity"),
    layout.TOOLS_IMAGE: ("sh",),
}


def write_images(archive: Path, commands: Mapping[str, Sequence[str]] = OWN) -> None:
    """Write images of busybox into one OCI archive: by their names, what each runs by default.

    Raises ``ClusterError`` when the machine's busybox is no use.
    """
    busybox = find("busybox")
    if busybox is None:
        raise ClusterError("busybox is missing; run: apt-get install busybox-static")
    content = Path(busybox).read_bytes()
    if b"/ld-linux" in content[:4096]:
        raise ClusterError(f"{busybox} needs libraries; run: apt-get install busybox-static")
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    layer = _layer(content, listed.stdout.split())
    with tarfile.open(archive, "w") as tar:
        manifests = [
            _image(tar, layer, name, command=command) for name, command in commands.items()
        ]
        _add_blob(tar, layer)
        index = {"schemaVersion": 2, "manifests": manifests}
        _add(tar, "index.json", _json(index))
        _add(tar, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))


def _layer(busybox: bytes, applets: Sequence[str]) -> bytes:
    """A root directory with busybox under all its names."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, mode in (("bin", 0o755), ("etc", 0o755), ("root", 0o700), ("tmp", 0o1777)):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, mode
            tar.addfile(directory)
        _add(tar, _BUSYBOX, busybox, mode=0o755)
        _add(tar, "etc/passwd", b"root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
        _add(tar, "etc/group", b"root:x:0:\nnogroup:x:65534:\n")
        for applet in applets:
            if f"bin/{applet}" != _BUSYBOX:
                link = tarfile.TarInfo(f"bin/{applet}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(link)
    return buffer.getvalue()


def _image(
    tar: tarfile.TarFile, layer: bytes, name: str, *, command: Sequence[str]
) -> Mapping[str, Any]:
    """Add an image of one layer, except for the layer itself; its entry for the index."""
    config = {
        "architecture": _architecture(),
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": list(command)},
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": _add_blob(tar, _json(config)) | {"mediaType": _CONFIG},
        "layers": [_describe(layer) | {"mediaType": _LAYER}],
    }
    annotations = {"io.containerd.image.name": name}
    described = _add_blob(tar, _json(manifest))
    return described | {"mediaType": _MANIFEST, "annotations": annotations}


def _architecture() -> str:
    machine = subprocess.run(["uname", "-m"], capture_output=True, text=True, check=True)
    name = machine.stdout.strip()
    return _MACHINES.get(name, name)


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _describe(content: bytes) -> dict[str, Any]:
    return {"digest": _digest(content), "size": len(content)}


def _add_blob(tar: tarfile.TarFile, content: bytes) -> dict[str, Any]:
    described = _describe(content)
    _add(tar, f"blobs/{described['digest'].replace(':', '/')}", content)
    return described


def _add(tar: tarfile.TarFile, name: str, content: bytes, *, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))
