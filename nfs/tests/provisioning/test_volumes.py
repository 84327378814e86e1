"""Claims become NFS volumes and go away again, without traces and within the manifest's rights."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from external_storage import PersistentVolume
from external_storage.kube.names import ANN_GID

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_fifty_claims_at_once_become_fifty_exports_and_leave_nothing(deployment: Any) -> None:
    deployment.start()
    storage_class = deployment.storage_class()
    deployment.claims_at_once([f"claim-{number}" for number in range(50)], storage_class)
    volumes = deployment.wait_bound(50)

    known = deployment.everything()
    assert len(known["volumes"]) == 50
    assert all(names == known["volumes"] for names in known.values()), known
    ids = list(deployment.live_exports())
    assert len(set(ids)) == 50
    assert not {0, 152} & set(ids)
    for volume in volumes:
        assert volume.spec.nfs.server == "127.0.0.1"
        assert volume.spec.nfs.path == f"/export/{volume.name}"
        assert volume.spec.mount_options == (f"port={deployment.nfs_port}",)

    deployment.delete_claims()
    deployment.wait_gone()
    assert deployment.everything() == {place: [] for place in known}


def test_a_fresh_volume_is_empty_and_its_record_lies_outside(
    deployment: Any, wait_until: Callable[..., None]
) -> None:
    deployment.start()
    deployment.claim("data", deployment.storage_class())
    (volume,) = deployment.wait_bound(1)
    directory = deployment.export_root / volume.name
    assert list(directory.iterdir()) == []
    assert stat.S_IMODE(directory.stat().st_mode) == 0o2777
    file = deployment.export_root / ".state" / "volumes" / f"{volume.name}.json"
    wait_until(lambda: json.loads(file.read_text())["state"] == "published", what="published")
    record = json.loads(file.read_text())
    assert record["claim_uid"] == volume.spec.claim_ref.uid
    assert record["details"]["exportId"] in deployment.live_exports()
    assert stat.S_IMODE((deployment.export_root / ".state").stat().st_mode) == 0o700


def test_a_file_written_over_nfs_is_read_back_and_goes_with_its_claim(
    deployment: Any, libnfs: Callable[..., Any]
) -> None:
    deployment.start()
    deployment.claim("data", deployment.storage_class())
    (volume,) = deployment.wait_bound(1)
    url = deployment.url(f"{volume.spec.nfs.path}/hello")
    source = deployment.root / "hello"
    source.write_text("hello over NFS\n")
    libnfs("nfs-cp", str(source), url)
    assert libnfs("nfs-cat", url).stdout == "hello over NFS\n"
    assert (deployment.export_root / volume.name / "hello").read_text() == "hello over NFS\n"
    deployment.delete_claims()
    deployment.wait_gone()
    listed = libnfs("nfs-ls", url, check=False)
    assert listed.returncode != 0


def test_gid_gives_the_volume_its_group_mode_and_annotation(deployment: Any) -> None:
    deployment.start()
    deployment.claim("data", deployment.storage_class(gid="1234", rootSquash="true"))
    (volume,) = deployment.wait_bound(1)
    found = (deployment.export_root / volume.name).stat()
    assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 0o2770)
    assert volume.metadata.annotations[ANN_GID] == "1234"
    file = deployment.export_root / ".state" / "exports.d" / f"{volume.name}.conf"
    assert "root_id_squash" in file.read_text()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rootSqush": "true"}, ["'rootSqush'", "allowed parameters: gid, rootSquash"]),
        ({"gid": "wheel"}, ["'gid'", "'wheel' is not a whole number"]),
        ({"gid": "0"}, ["'gid'", "1 to"]),
    ],
)
def test_a_bad_parameter_is_one_warning_that_names_it(
    deployment: Any,
    parameters: dict[str, str],
    words: list[str],
    wait_until: Callable[..., None],
) -> None:
    deployment.start()
    deployment.claim("data", deployment.storage_class(**parameters))
    deployment.claim("good", deployment.storage_class("-good"))
    wait_until(lambda: deployment.events("data", "ProvisioningFailed"), what="an event")
    (event,) = deployment.events("data", "ProvisioningFailed")
    assert event.type == "Warning"
    assert event.count == 1
    assert all(word in event.message for word in words), event.message
    wait_until(lambda: len(deployment.volumes()) == 1, what="the good claim's volume")
    assert deployment.metric(r"controller_persistentvolumeclaim_provision_failed_total") == 1


def test_the_audit_log_shows_no_403_of_ours(deployment: Any) -> None:
    deployment.start()
    deployment.claim("data", deployment.storage_class())
    deployment.wait_bound(1)
    deployment.delete_claims()
    deployment.wait_gone()
    assert deployment.stop() == 0
    ours = [
        event
        for event in deployment.plane.audit_events()
        if event["user"]["username"] == "system:serviceaccount:nfs-provisioner:nfs-provisioner"
        and deployment.name in event.get("userAgent", "")
    ]
    assert ours
    refused = [e for e in ours if e.get("responseStatus", {}).get("code") == 403]
    assert refused == []


def test_a_volume_of_another_instance_is_left_alone(
    deployment: Any, wait_until: Callable[..., None]
) -> None:
    deployment.start()
    storage_class = deployment.storage_class()
    deployment.claim("data", storage_class)
    (volume,) = deployment.wait_bound(1)
    key = "nfs.external-storage/provisioner-id"
    deployment.api.patch(
        PersistentVolume, volume.name, {"metadata": {"annotations": {key: "somebody-else"}}}
    )
    deployment.claim("ours", storage_class)
    deployment.wait_bound(2)
    deployment.delete_claims()
    wait_until(lambda: len(deployment.volumes()) == 1, what="our own volume is deleted")
    assert deployment.directories() == [volume.name]
    assert [left.name for left in deployment.volumes()] == [volume.name]


def test_sigterm_ends_it_cleanly_and_takes_the_server_along(deployment: Any) -> None:
    deployment.start()
    ganesha = deployment.child("ganesha")
    assert ganesha
    assert deployment.stop() == 0
    assert not Path(f"/proc/{ganesha}").exists()
    with pytest.raises(FileNotFoundError):
        (deployment.root / "run" / "bus").stat()


def test_the_capabilities_of_the_manifest_suffice(
    deployment: Any, libnfs: Callable[..., Any]
) -> None:
    manifest = yaml.safe_load((DEPLOY / "deployment.yaml").read_text())
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    capabilities = container["securityContext"]["capabilities"]
    assert capabilities["drop"] == ["ALL"]
    kept = ",".join(f"+{name.lower()}" for name in capabilities["add"])
    deployment.command = ("setpriv", f"--bounding-set=-all,{kept}", *deployment.command)
    deployment.start()
    deployment.claim("data", deployment.storage_class(gid="4321"))
    (volume,) = deployment.wait_bound(1)
    url = deployment.url(f"{volume.spec.nfs.path}/hello")
    source = deployment.root / "hello"
    source.write_text("hello\n")
    libnfs("nfs-cp", str(source), f"{url}&uid=1000&gid=4321")
    written = (deployment.export_root / volume.name / "hello").stat()
    assert (written.st_uid, written.st_gid) == (1000, 4321)
    deployment.delete_claims()
    deployment.wait_gone()
    assert deployment.directories() == []


def test_manifests_are_accepted_by_the_api_server(deployment: Any) -> None:
    deployment.plane.kubectl("apply", "--dry-run=server", "-k", str(DEPLOY))
    for example in sorted((DEPLOY / "examples").glob("*.yaml")):
        deployment.plane.kubectl("apply", "--dry-run=server", "-f", str(example))


def test_bad_settings_are_told_all_at_once(deployment: Any) -> None:
    done = subprocess.run(
        [*deployment.command, "--nfs-port=99999", "--grace-period=200", "--log-format=xml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "SERVICE_NAME": ""},
    )
    assert done.returncode == 2
    for flag in ("--nfs-port", "--grace-period", "--log-format", "--server-hostname"):
        assert flag in done.stderr


def test_a_port_that_is_taken_is_told_plainly(deployment: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", deployment.nfs_port))
        taken.listen()
        deployment.start(ready=False)
        assert deployment.process.wait(60) == 1
    (line,) = [line for line in deployment.tail().splitlines() if "cannot start" in line]
    assert f"port {deployment.nfs_port}" in line
    assert "Traceback" not in deployment.tail()
