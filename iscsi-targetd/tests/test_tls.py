"""targetd over TLS: only the one whose certificate our authority has signed is told anything."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.targetd_server import MIB, PASSWORD, USER, Model, TargetdServer

from external_storage import Deadline, Owner, Unchanged
from external_storage.testing.certificates import CertificateAuthority
from iscsi_targetd_provisioner.backend import Backend
from iscsi_targetd_provisioner.observing import Observations
from iscsi_targetd_provisioner.servers import BadServers, read_servers


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority()


@pytest.fixture
def server(authority: CertificateAuthority, tmp_path: Path) -> Iterator[TargetdServer]:
    pair = authority.issue_server(["127.0.0.1"])
    certificate = tmp_path / "server.pem"
    certificate.write_bytes(pair.certificate + pair.key)
    with TargetdServer(Model(pools={"vg": 64 * MIB}), certificate=certificate) as made:
        yield made


def backend(directory: Path, **config: str) -> Backend:
    """As the file of servers makes it."""
    (directory / "user").write_text(f"{USER}\n")
    (directory / "password").write_text(f"{PASSWORD}\n")
    files = {
        "usernameFile": str(directory / "user"),
        "passwordFile": str(directory / "password"),
        "iqn": "iqn.2003-01.org.linux-iscsi.storage:targetd",
    }
    path = directory / "servers.yaml"
    path.write_text(json.dumps({"servers": {"storage": {"type": "targetd", **files, **config}}}))
    observe = Observations(CollectorRegistry()).of("storage")
    return read_servers(path)["storage"].build("storage", lambda: Owner("cluster", ("a",)), observe)


def soon() -> Deadline:
    return Deadline(time.monotonic() + 60)


def test_a_certificate_of_our_authority_is_trusted(
    server: TargetdServer, authority: CertificateAuthority, tmp_path: Path
) -> None:
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    found = backend(tmp_path, url=server.url, caFile=str(tmp_path / "ca.crt")).pools(soon())
    assert [pool.name for pool in found] == ["vg"]


def test_one_of_another_authority_is_told_nothing(server: TargetdServer, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(CertificateAuthority().certificate)
    for config in ({"caFile": str(tmp_path / "ca.crt")}, {}):
        with pytest.raises(Unchanged, match="its certificate is not one we trust"):
            backend(tmp_path, url=server.url, **config).pools(soon())
    assert server.calls == []


def test_one_of_another_host_is_told_nothing(
    server: TargetdServer, authority: CertificateAuthority, tmp_path: Path
) -> None:
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    url = server.url.replace("127.0.0.1", "localhost")
    with pytest.raises(Unchanged, match="its certificate is not one we trust"):
        backend(tmp_path, url=url, caFile=str(tmp_path / "ca.crt")).pools(soon())
    assert server.calls == []


def test_a_targetd_without_tls_is_told_nothing(
    targetd: TargetdServer, authority: CertificateAuthority, tmp_path: Path
) -> None:
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    url = targetd.url.replace("http:", "https:")
    with pytest.raises(Unchanged, match="no TLS"):
        backend(tmp_path, url=url, caFile=str(tmp_path / "ca.crt")).pools(soon())
    assert targetd.calls == []


def test_a_file_that_is_no_authority_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("nonsense\n")
    for name in ("ca.crt", "none"):
        with pytest.raises(BadServers, match=f"caFile .*{name}"):
            backend(tmp_path, url="https://127.0.0.1:1", caFile=str(tmp_path / name))
