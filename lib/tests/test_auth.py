"""Where the API server is, and how we prove who we are."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from external_storage.kube.auth import FileToken, NoToken, from_kubeconfig, in_cluster, load
from external_storage.kube.errors import ConfigError
from external_storage.testing.builders import Clock

IN_POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "6443"}


@pytest.fixture(autouse=True)
def no_kubeconfig_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KUBECONFIG", raising=False)


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """What the kubelet mounts into a pod."""
    directory = tmp_path / "serviceaccount"
    directory.mkdir()
    (directory / "token").write_text("token-1\n")
    (directory / "ca.crt").write_text("a certificate")
    (directory / "namespace").write_text("storage\n")
    return directory


def write_kubeconfig(path: Path, **cluster: Any) -> str:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": "https://one.example:6443/", **cluster}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
        "contexts": [
            {"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "mine"}}
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return str(path)


# -- tokens


def test_no_token_is_none() -> None:
    token = NoToken()
    token.refresh()
    assert token.token() is None


def test_a_token_file_is_read_again_every_minute(account: Path) -> None:
    clock, file = Clock(), account / "token"
    token = FileToken(file, clock)
    assert token.token() == "token-1"
    file.write_text("token-2")
    clock.advance(59)
    assert token.token() == "token-1"
    clock.advance(1)
    assert token.token() == "token-2"


def test_a_refused_token_is_read_again_at_once(account: Path) -> None:
    token = FileToken(account / "token", Clock())
    token.token()
    (account / "token").write_text("token-2")
    token.refresh()
    assert token.token() == "token-2"


def test_the_last_token_is_kept_while_the_file_cannot_be_read(account: Path) -> None:
    clock = Clock()
    token = FileToken(account / "token", clock)
    token.token()
    (account / "token").unlink()
    clock.advance(60)
    assert token.token() == "token-1"


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_no_first_token_is_a_config_error_that_names_the_file(
    tmp_path: Path, text: str | None
) -> None:
    file = tmp_path / "token"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=str(file)):
        FileToken(file).token()


def test_a_token_file_that_is_no_text_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError):
        FileToken(tmp_path / "token").token()


# -- in a pod


def test_a_pod_has_all_it_needs_without_a_kubeconfig(account: Path) -> None:
    config = load(environ=IN_POD, service_account_dir=account)
    assert config.server == "https://10.96.0.1:6443"
    assert config.ca_file == account / "ca.crt"
    assert config.namespace == "storage"
    assert config.tokens.token() == "token-1"
    assert config.verify


def test_an_ipv6_address_gets_its_brackets(account: Path) -> None:
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1"}
    assert (
        in_cluster(environ=environ, service_account_dir=account).server == "https://[fd00::1]:443"
    )


def test_pod_namespace_wins_over_the_mounted_one(account: Path) -> None:
    environ = IN_POD | {"POD_NAMESPACE": "given"}
    assert in_cluster(environ=environ, service_account_dir=account).namespace == "given"


def test_without_its_ca_a_pod_does_not_trust_the_systems(account: Path) -> None:
    (account / "ca.crt").unlink()
    with pytest.raises(ConfigError, match=r"ca\.crt: missing"):
        load(environ=IN_POD, service_account_dir=account)


def test_outside_of_a_pod_in_cluster_says_so(account: Path) -> None:
    with pytest.raises(ConfigError, match="not in a pod"):
        in_cluster(environ={}, service_account_dir=account)


# -- by kubeconfig


def test_a_kubeconfig_gives_server_token_and_namespace(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("a certificate")
    path = write_kubeconfig(tmp_path / "config", **{"certificate-authority": "ca.pem"})
    config = from_kubeconfig(path, environ={})
    assert config.server == "https://one.example:6443"
    assert config.tokens.token() == "secret"
    assert config.namespace == "mine"
    assert config.ca_file == tmp_path / "ca.pem"


def test_master_replaces_the_server_of_the_kubeconfig(tmp_path: Path) -> None:
    path = write_kubeconfig(tmp_path / "config")
    config = from_kubeconfig(path, master="https://two.example/", environ={})
    assert config.server == "https://two.example"


def test_verification_is_off_only_when_asked_for(tmp_path: Path) -> None:
    assert from_kubeconfig(write_kubeconfig(tmp_path / "a"), environ={}).verify
    insecure = write_kubeconfig(tmp_path / "b", **{"insecure-skip-tls-verify": True})
    assert not from_kubeconfig(insecure, environ={}).verify


def test_what_we_cannot_honour_is_refused(tmp_path: Path) -> None:
    path = write_kubeconfig(tmp_path / "config", **{"tls-server-name": "other"})
    with pytest.raises(ConfigError, match="tls-server-name is not supported"):
        from_kubeconfig(path, environ={})


def test_a_missing_kubeconfig_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        from_kubeconfig(str(tmp_path / "missing"), environ={})


@pytest.mark.parametrize("text", ["{", "[]", "just text", "a: b: c"])
def test_a_broken_kubeconfig_is_a_config_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config").write_text(text)
    with pytest.raises(ConfigError):
        from_kubeconfig(str(tmp_path / "config"), environ={})


# -- which of them


def test_an_explicit_kubeconfig_wins_over_the_pod(account: Path, tmp_path: Path) -> None:
    path = write_kubeconfig(tmp_path / "config")
    config = load(kubeconfig=path, environ=IN_POD, service_account_dir=account)
    assert config.server == "https://one.example:6443"


def test_the_pod_wins_over_the_variable(account: Path, tmp_path: Path) -> None:
    environ = IN_POD | {"KUBECONFIG": write_kubeconfig(tmp_path / "config")}
    assert "10.96.0.1" in load(environ=environ, service_account_dir=account).server


def test_nothing_at_all_is_a_config_error_that_lists_the_places(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--kubeconfig, KUBECONFIG nor"):
        load(environ={}, service_account_dir=tmp_path)


def test_a_user_without_a_home_directory_gets_the_same_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pods run as any UID: one that is in no passwd file, and HOME need not be set."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 4_000_000)
    with pytest.raises(ConfigError):
        load(environ={}, service_account_dir=tmp_path)


def test_a_kubeconfig_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing: no such file"):
        load(kubeconfig=str(tmp_path / "missing"), environ={}, service_account_dir=tmp_path)


def test_an_address_without_credentials_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--master https://x: credentials are missing"):
        load(master="https://x", environ={}, service_account_dir=tmp_path)
