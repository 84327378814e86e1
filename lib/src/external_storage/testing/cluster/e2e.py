"""pytest fixtures of scenarios: ``-p external_storage.testing.cluster.e2e``, which hack/e2e adds.

A scenario is ``NAME/e2e/test_*.py`` of a package. It gets the provisioner deployed from
``NAME/deploy`` (``deployed``), and a namespace to use it from (``space``), on a cluster of the
session's own or on one that is given by its kubeconfig.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from external_storage.testing.access import ControlPlaneError
from external_storage.testing.cluster import layout
from external_storage.testing.cluster.cluster import Cluster
from external_storage.testing.cluster.deployed import Deployed, Site, refuse_occupied
from external_storage.testing.cluster.existing import ExistingCluster
from external_storage.testing.cluster.space import Space
from external_storage.testing.guest import Guest

_TOOLS = "busybox"


@dataclass(frozen=True, slots=True, kw_only=True)
class NfsExport:
    """A directory that nodes can mount, with no_root_squash."""

    server: str
    path: str


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("scenarios")
    group.addoption(
        "--kubeconfig", type=Path, help="a cluster that is there, in place of a new one"
    )
    group.addoption(
        "--image",
        action="append",
        default=[],
        metavar="NAME=REFERENCE",
        help="where the given cluster finds an image; 'busybox' is what test pods run",
    )
    group.addoption(
        "--nfs-export",
        metavar="SERVER:/PATH",
        help="a directory that the given cluster's nodes can mount, for scenarios to fill",
    )
    group.addoption(
        "--iscsi-storage",
        type=Path,
        metavar="DIR",
        help="the storage hosts of the given cluster: servers.yaml, and the files it names",
    )
    group.addoption("--images", type=Path, help="the directory of hack/build-images --archive")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What the provisioner's pods say belongs to a test that has failed: soon they are gone."""
    report = yield
    deployed = getattr(item, "funcargs", {}).get("deployed")
    if call.when == "call" and report.failed and deployed is not None:
        with contextlib.suppress(ControlPlaneError):
            report.sections.append(("The provisioner", deployed.explain()))
    return report


@pytest.fixture(scope="session")
def images(request: pytest.FixtureRequest) -> Mapping[str, str]:
    """References of images by their names, as far as told."""
    pairs = (text.partition("=") for text in request.config.getoption("--image"))
    return {name: reference for name, _, reference in pairs}


@pytest.fixture(scope="session")
def site(request: pytest.FixtureRequest, images: Mapping[str, str]) -> Iterator[Site]:
    """The cluster."""
    kubeconfig = request.config.getoption("--kubeconfig")
    if kubeconfig is None:
        yield request.getfixturevalue("cluster")
        return
    existing = ExistingCluster(kubeconfig, tools_image=images.get(_TOOLS, "busybox:1.36"))
    yield existing
    existing.close()


@pytest.fixture(scope="session")
def joined_guest(request: pytest.FixtureRequest, site: Site) -> Guest | None:
    """The virtual machine that is added to a cluster of our own; none to one that is given."""
    if not isinstance(site, Cluster):
        return None
    # Before it starts: it would take minutes to unpack them itself.
    for archive in sorted(_archives(request.config).glob("*.tar")):
        site.load_image(archive)
    return site.add_guest()


@pytest.fixture(scope="session")
def kernel_node(site: Site, joined_guest: Guest | None) -> str:
    """A node whose kernel mounts NFS and iSCSI: of a cluster of our own, a guest that is added."""
    return site.guest_name if isinstance(site, Cluster) else site.kernel_node_name


@pytest.fixture(scope="module")
def nfs_export(request: pytest.FixtureRequest, joined_guest: Guest | None) -> NfsExport:
    """A directory of an NFS server: of a cluster of our own, of the guest's kernel."""
    if joined_guest is not None:
        path = f"/srv/{request.path.parent.parent.name}"
        # insecure: some clients, such as that of EFS's mount options, come from a high port.
        joined_guest.serve_nfs(path, options="rw,sync,no_root_squash,insecure")
        return NfsExport(server=layout.GUEST_ADDRESS, path=path)
    server, _, path = (request.config.getoption("--nfs-export") or "").rpartition(":")
    if not server or not path.startswith("/"):
        pytest.skip("on an existing cluster it needs --nfs-export SERVER:/PATH")
    return NfsExport(server=server, path=path)


@pytest.fixture(scope="module", autouse=True)
def unoccupied(request: pytest.FixtureRequest, site: Site) -> None:
    """Before anything is prepared on a cluster that is given: no installation is to be harmed."""
    if isinstance(site, ExistingCluster):
        refuse_occupied(site, request.path.parent.parent / "deploy")


@pytest.fixture(scope="module")
def prepared() -> None:
    """Overridden by a scenario whose provisioner needs something before it is deployed."""


@pytest.fixture(scope="module")
def patches() -> Sequence[Mapping[str, Any]]:
    """Overridden by a scenario that deploys otherwise than the manifests say; kustomize's."""
    return ()


@pytest.fixture(scope="module")
def rollout_limit_s() -> float:
    """Overridden by a scenario whose provisioner starts on an emulated node, and is large."""
    return 180.0


@pytest.fixture(scope="module")
def deployed(
    request: pytest.FixtureRequest,
    site: Site,
    images: Mapping[str, str],
    patches: Sequence[Mapping[str, Any]],
    rollout_limit_s: float,
    prepared: None,
) -> Iterator[Deployed]:
    """The provisioner of the scenario's package, ready."""
    package = request.path.parent.parent
    if isinstance(site, Cluster):
        site.load_image(_archives(request.config) / f"external-storage-{package.name}.tar")
    deploy, limit_s = package / "deploy", rollout_limit_s
    with Deployed(site, deploy, images=images, patches=patches, limit_s=limit_s) as made:
        yield made


def _archives(config: pytest.Config) -> Path:
    directory: Path | None = config.getoption("--images")
    if directory is None:
        raise pytest.UsageError("--images or --kubeconfig is needed; hack/e2e gives one of them")
    return directory


@pytest.fixture
def space(site: Site) -> Iterator[Space]:
    """A namespace of the test's own, for claims and pods."""
    made = Space.create(site, f"scenario-{uuid.uuid4().hex[:8]}")
    yield made
    made.delete()
