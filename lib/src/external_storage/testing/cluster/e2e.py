"""pytest fixtures of scenarios: ``-p external_storage.testing.cluster.e2e``, which hack/e2e adds.

A scenario is ``NAME/e2e/test_*.py`` of a package. It gets the provisioner deployed from
``NAME/deploy`` (``deployed``), and a namespace to use it from (``space``), on a cluster of the
session's own or on one that is given by its kubeconfig.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from external_storage.testing.cluster.cluster import Cluster
from external_storage.testing.cluster.deployed import Deployed, Site
from external_storage.testing.cluster.existing import ExistingCluster
from external_storage.testing.cluster.space import Space

_TOOLS = "busybox"


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
    group.addoption("--images", type=Path, help="the directory of hack/build-images --archive")


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
def kernel_node(request: pytest.FixtureRequest, site: Site) -> str:
    """A node whose kernel mounts NFS and iSCSI: of a cluster of our own, a guest that is added."""
    if not isinstance(site, Cluster):
        return site.kernel_node_name
    # Before it starts: it would take minutes to unpack them itself.
    for archive in sorted(_archives(request.config).glob("*.tar")):
        site.load_image(archive)
    site.add_guest()
    return site.guest_name


@pytest.fixture(scope="module")
def prepared() -> None:
    """Overridden by a scenario whose provisioner needs something before it is deployed."""


@pytest.fixture(scope="module")
def patches() -> Sequence[Mapping[str, Any]]:
    """Overridden by a scenario that deploys otherwise than the manifests say; kustomize's."""
    return ()


@pytest.fixture(scope="module")
def deployed(
    request: pytest.FixtureRequest,
    site: Site,
    images: Mapping[str, str],
    patches: Sequence[Mapping[str, Any]],
    prepared: None,
) -> Iterator[Deployed]:
    """The provisioner of the scenario's package, ready."""
    package = request.path.parent.parent
    if isinstance(site, Cluster):
        site.load_image(_archives(request.config) / f"external-storage-{package.name}.tar")
    with Deployed(site, package / "deploy", images=images, patches=patches) as made:
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
