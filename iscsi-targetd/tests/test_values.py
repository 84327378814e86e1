"""Names, portals, credentials, classes and the file of servers: what is taken, what is refused."""

from __future__ import annotations

import ast
import base64
from pathlib import Path
from typing import Any, cast

import pytest

from external_storage import Problems, ProvisioningFailed, Unchanged
from external_storage.kube.errors import Forbidden, KubeError
from external_storage.kube.types import Secret
from iscsi_targetd_provisioner.__main__ import _translate_level, _without_ignored
from iscsi_targetd_provisioner.chap import Chap, ChapError
from iscsi_targetd_provisioner.credentials import Credentials
from iscsi_targetd_provisioner.host.source import helper_source
from iscsi_targetd_provisioner.names import Portal, iqn_problem
from iscsi_targetd_provisioner.servers import BadServers, LioConfig, read_servers
from iscsi_targetd_provisioner.settings import IscsiTargetdParameters, IscsiTargetdSettings


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("10.0.0.5", "10.0.0.5:3260"),
        (" 10.0.0.5:3261 ", "10.0.0.5:3261"),
        ("storage.example.com", "storage.example.com:3260"),
        ("fd00::5", "[fd00::5]:3260"),
        ("[fd00:0:0::5]:3261", "[fd00::5]:3261"),
    ],
)
def test_portals_are_understood(text: str, shown: str) -> None:
    assert str(Portal.parse(text)) == shown


@pytest.mark.parametrize(
    "text", ["", ":3260", "a b", "10.0.0.5:0", "10.0.0.5:65536", "[::1", "[x]"]
)
def test_what_is_no_portal_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="want HOST"):
        Portal.parse(text)


@pytest.mark.parametrize(
    "name",
    [
        "iqn.1993-08.org.debian:01:5a7c1f2be9d",
        "iqn.2026-01.com.example",
        "eui.0123456789abcdef",
        "naa.5000000000000001",
    ],
)
def test_initiator_names_are_understood(name: str) -> None:
    assert iqn_problem(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "iqn.2026-13.com.example:x",
        "iqn.2026-01.com.ex_ample:x",
        "iqn.2026-01.com",
        "iqn.2024-01.localhost:n1",
        "iqn.26-1.a.b",
        "iqn.2026-01.a.b:",
        "iqn.2026-01.com.example:" + "x" * 200,
        "iqn.2026-01.com.example:a b",
        "host1",
    ],
)
def test_what_is_no_initiator_name_is_refused(name: str) -> None:
    assert iqn_problem(name) is not None


KEYS = {"node.session.auth.username": "alice", "node.session.auth.password": "a long secret"}


def test_one_way_credentials_need_no_others() -> None:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in KEYS.items()}
    chap = Chap.from_secret(data, source="Secret a/b")
    assert (chap.user, chap.password, chap.mutual) == ("alice", "a long secret", False)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "has no key node.session.auth.username"),
        ({**KEYS, "node.session.auth.username_in": "bob"}, "only one of"),
        ({**KEYS, "node.session.auth.password": "NULL"}, "is not printable text"),
        ({**KEYS, "node.session.auth.password": "x" * 256}, "at most 255 bytes"),
        (
            {
                **KEYS,
                "node.session.auth.username_in": "bob",
                "node.session.auth.password_in": "a long secret",
            },
            "are the same",
        ),
    ],
)
def test_bad_credentials_are_told_without_being_shown(keys: dict[str, str], words: str) -> None:
    with pytest.raises(ChapError, match=words) as caught:
        Chap.from_keys(keys, source="Secret a/b")
    assert "a long secret" not in str(caught.value)
    assert "x" * 20 not in str(caught.value)


def test_the_originals_file_of_credentials_is_read(tmp_path: Path) -> None:
    path = tmp_path / "session-chap-credential.properties"
    lines = [f"{key} = {value}" for key, value in KEYS.items()]
    path.write_text("# for all volumes\n" + "\n".join(lines) + "\n")
    assert Chap.from_properties(path).user == "alice"
    with pytest.raises(ChapError, match="cannot be read: No such file"):
        Chap.from_properties(tmp_path / "none")


def test_credentials_do_not_show_in_their_repr() -> None:
    settings = IscsiTargetdSettings.from_texts(
        {"provisioner_name": "a", "targetd_password": "a long secret"}
    )
    assert settings.targetd_password == "a long secret"
    assert "a long secret" not in repr(settings)
    assert "secret" not in repr(Chap("alice", "a long secret", "bob", "another secret"))


def test_all_problems_of_a_class_are_told_at_once() -> None:
    with pytest.raises(Problems) as caught:
        IscsiTargetdParameters.from_class(
            {
                "targetPortal": "a b",
                "iqn": "x",
                "initiators": "y",
                "pool": "a",
                "volumeGroup": "b",
                "chapSecretName": "chap",
                "nonsense": "1",
            }
        )
    text = str(caught.value)
    for key in ("targetPortal", "iqn", "initiators", "pool", "chapSecretName", "nonsense"):
        assert key in text


def test_a_class_of_the_original_is_understood() -> None:
    parameters = IscsiTargetdParameters.from_class(
        {
            "targetPortal": "192.168.99.100:3260",
            "portals": "192.168.99.101:3260,192.168.99.102:3260",
            "iqn": "iqn.2003-01.org.linux-iscsi.minishift:targetd",
            "iscsiInterface": "default",
            "volumeGroup": "vg-targetd",
            "initiators": "iqn.2017-04.com.example:node1, iqn.2017-04.com.example:node2,",
            "chapAuthDiscovery": "true",
            "chapAuthSession": "true",
            "fsType": "xfs",
            "readonly": "false",
        }
    )
    assert parameters.wanted_pool == "vg-targetd"
    assert len(parameters.initiators) == 2


GOOD = """
servers:
  a:
    type: lio-ssh
    ssh: {host: h, knownHosts: /k, keyFile: /f}
    iqn: iqn.2026-01.com.example:a
    portals: ["10.0.0.5", "fd00::5"]
    pools: [vg, {name: vg/thin, overcommit: 2.5}]
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "servers.yaml"
    path.write_text(text)
    return path


def test_a_file_of_servers_is_read(tmp_path: Path) -> None:
    config = read_servers(written(tmp_path, GOOD))["a"]
    assert isinstance(config, LioConfig)
    assert config.pool_factors() == {"vg": 1.0, "vg/thin": 2.5}


TARGETD = "type: targetd, usernameFile: /u, passwordFile: /p"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"10.0.0.5", ', '"storage.example.com", ', "LIO cannot listen on storage.example.com"),
        (
            GOOD,
            f"servers: {{a: {{{TARGETD}, url: 'https://h', maxLun: 256}}}}",
            "between 0 and 255",
        ),
        ("keyFile", "keyfile", "unknown field `keyfile`"),
        ("lio-ssh", "ssh", "Invalid value 'ssh'"),
        ("pools: [vg, {name: vg/thin, overcommit: 2.5}]", "pools: [a/b/c]", "'a/b/c' is not GROUP"),
        ("2.5", "0.5", "is 0.5, below 1"),
        ('"10.0.0.5"', '"10.0.0.5:x"', "is not a portal"),
        ("iqn.2026-01.com.example:a", "storage", "is not an iSCSI name"),
        (", keyFile: /f", "", "keyFile or passwordFile must be given"),
        ("servers:", "server:", "unknown field"),
        (GOOD, "servers: {}", "there is none"),
        (GOOD, "servers: [", "is not YAML"),
        (GOOD, f"servers: {{a: {{{TARGETD}, url: 'http://h:1'}}}}", "shows the password"),
        (GOOD, f"servers: {{a: {{{TARGETD}, url: 'ftp://h'}}}}", "is not http://HOST:PORT"),
    ],
)
def test_a_bad_file_of_servers_says_what_and_where(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    with pytest.raises(BadServers, match=words):
        read_servers(written(tmp_path, GOOD.replace(old, new)))


@pytest.mark.parametrize(
    "more", ["allowPlainHttp: true", "tunnel: {host: h, knownHosts: /k, keyFile: /f}"]
)
def test_plain_http_is_taken_where_it_is_meant(tmp_path: Path, more: str) -> None:
    text = f"servers: {{a: {{{TARGETD}, url: 'http://h:1', {more}}}}}"
    assert set(read_servers(written(tmp_path, text))) == {"a"}


def test_the_helper_is_one_file_that_needs_only_the_hosts_python() -> None:
    tree = ast.parse(helper_source(), feature_version=(3, 9))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported <= {
        *("__future__", "argparse", "collections", "contextlib", "fcntl", "importlib", "json"),
        *("os", "pathlib", "platform", "re", "select", "socket", "subprocess", "sys", "tempfile"),
        *("threading", "time", "typing", "uuid"),
    }


def test_flags_of_the_original_without_effect_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--resync-period", "15m", "--exponential-backoff-on-error", "--lease-period=15s", "-x"]
    assert _without_ignored(flags) == ["-x"]
    assert _without_ignored(["--log-level", "warn", "--log-level=panic", "-x"]) == [
        "--log-level",
        "warning",
        "--log-level=error",
        "-x",
    ]
    environment = {"LOG_LEVEL": "Warn"}
    _translate_level(environment)
    assert environment == {"LOG_LEVEL": "warning"}
    assert "--lease-period has no effect" in capsys.readouterr().err


class Api:
    """The API server as far as credentials are read from it."""

    def __init__(self, answer: Secret | Exception | None) -> None:
        self.answer = answer

    def find(self, *_args: object, **_kwargs: object) -> Secret | None:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


SECRET = Secret(data={key: base64.b64encode(text.encode()).decode() for key, text in KEYS.items()})


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (None, ProvisioningFailed, "Secret ns/chap with the CHAP credentials does not exist"),
        (Secret(), ProvisioningFailed, "Secret ns/chap has no key node.session.auth.username"),
        (Forbidden("no", code=403), ProvisioningFailed, "name it in a Role"),
        (KubeError("the API server is away"), Unchanged, "the API server is away"),
    ],
)
def test_a_secret_that_cannot_be_had_is_told(
    answer: Secret | Exception | None, kind: type[Exception], words: str
) -> None:
    credentials = Credentials(client=cast(Any, Api(answer)), namespace="ns", file=Path("/none"))
    asked = IscsiTargetdParameters.from_class({"chapAuthSession": "true", "chapSecretName": "chap"})
    with pytest.raises(kind, match=words):
        credentials.of_class(asked)


def test_a_class_reads_its_secret_each_time_and_without_one_the_originals_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "session-chap-credential.properties"
    credentials = Credentials(client=cast(Any, Api(SECRET)), namespace="ns", file=path)
    of_secret = {"chapAuthSession": "true", "chapSecretName": "chap"}
    found = credentials.of_class(IscsiTargetdParameters.from_class(of_secret))
    assert found is not None
    assert found.user == "alice"
    of_file = IscsiTargetdParameters.from_class({"chapAuthSession": "true"})
    with pytest.raises(ProvisioningFailed, match=r"without chapSecretName: .* cannot be read"):
        credentials.of_class(of_file)
    path.write_text("".join(f"{key}={value}\n" for key, value in KEYS.items()))
    assert credentials.of_class(of_file) == found
    assert credentials.of_class(IscsiTargetdParameters.from_class({})) is None
