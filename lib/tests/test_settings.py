"""The settings every provisioner has."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_storage.fields import Problems, Seconds
from external_storage.logs import LogFormat
from external_storage.settings import Settings

NAME = {"provisioner_name": "example.com/test"}


class HostPathSettings(Settings):
    root: Path = Path("/srv")
    """Directory that holds the volumes; absolute."""

    def validate(self) -> Iterable[str]:
        yield from super().validate()
        if not self.root.is_absolute():
            yield f"--root: {self.root} is not absolute"


def problems_of(**texts: str) -> list[str]:
    with pytest.raises(Problems) as caught:
        HostPathSettings.from_texts(NAME | texts)
    return caught.value.problems


def test_the_defaults_are_valid() -> None:
    settings = Settings.from_texts(NAME)
    assert settings.provisioner_name == "example.com/test"
    assert settings.http_address() is None


def test_every_setting_has_its_help() -> None:
    assert [info.name for info in HostPathSettings.fields() if not info.doc] == []


def test_an_authors_fields_come_after_the_librarys() -> None:
    names = [info.name for info in HostPathSettings.fields()]
    assert names[0] == "provisioner_name"
    assert names[-1] == "root"


def test_texts_become_settings() -> None:
    settings = HostPathSettings.from_texts(
        NAME | {"root": "/data", "timeout": "2m", "log_format": "JSON", "worker_threads": "8"}
    )
    expected = HostPathSettings(
        provisioner_name="example.com/test",
        root=Path("/data"),
        timeout=Seconds(120.0),
        log_format=LogFormat.JSON,
        worker_threads=8,
    )
    assert settings == expected


@pytest.mark.parametrize(
    ("field", "text", "problem"),
    [
        ("provisioner_name", "", "--provisioner-name: '' is not a provisioner name"),
        ("provisioner_name", "a/b/c", "--provisioner-name: 'a/b/c' is not a provisioner name"),
        ("provisioner_name", "a/b\n", "--provisioner-name: 'a/b\\n' is not a provisioner name"),
        ("worker_threads", "0", "--worker-threads: 0 is not between 1 and 1000"),
        ("worker_threads", "1001", "--worker-threads: 1001 is not between 1 and 1000"),
        ("retry_interval_start", "0", "--retry-interval-start: must be above 0"),
        ("retry_interval_max", "0.5s", "--retry-interval-max: is below --retry-interval-start"),
        ("timeout", "0s", "--timeout: must be above 0"),
        ("additional_provisioner_names", "a/b,c/d/e", "--additional-provisioner-names: 'c/d/e'"),
        ("kube_api_qps", "-1", "--kube-api-qps: is below 0"),
        ("kube_api_burst", "0", "--kube-api-burst: must be at least 1"),
        ("failed_provision_threshold", "-1", "--failed-provision-threshold: is below 0"),
        ("failed_delete_threshold", "-1", "--failed-delete-threshold: is below 0"),
        ("volume_name_template", "pvc", "--volume-name-template: 'pvc' lacks ${.PVC.uid}"),
        ("leader_elect_lease_duration", "9", "--leader-elect-lease-duration: must be above"),
        ("leader_elect_renew_deadline", "4", "--leader-elect-renew-deadline: must be above"),
        ("leader_elect_retry_period", "0", "--leader-elect-retry-period: must be above 0"),
        ("http_endpoint", "8080", "--http-endpoint: '8080' is not HOST:PORT or :PORT"),
        ("http_endpoint", ":65536", "--http-endpoint: ':65536' is not HOST:PORT or :PORT"),
        ("metrics_path", "metrics", "--metrics-path: 'metrics' does not begin with /"),
        ("log_level", "loud", "--log-level: 'loud' is not one of: debug, info, warning, error"),
        ("log_format", "xml", "--log-format: 'xml' is not one of: text, json"),
        ("root", "srv", "--root: srv is not absolute"),
    ],
)
def test_a_bad_setting_is_refused_by_its_flag(field: str, text: str, problem: str) -> None:
    [found] = problems_of(**{field: text})
    assert found.startswith(problem)


def test_all_bad_settings_are_named_at_once() -> None:
    found = problems_of(timeout="soon", worker_threads="0", root="srv", log_level="x")
    assert {problem.split(":")[0] for problem in found} == {
        "--timeout",
        "--worker-threads",
        "--root",
        "--log-level",
    }


@pytest.mark.parametrize("name", ["nfs", "example.com/nfs", "a.b-c.d/e_f.G", "9/9"])
def test_a_provisioner_name_is_a_name_with_or_without_a_vendor(name: str) -> None:
    assert Settings.from_texts({"provisioner_name": name}).provisioner_name == name


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        (":8080", ("", 8080)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:8080", ("::1", 8080)),
        ("::1:8080", None),
        ("[::1]", None),
        ("host:port", None),
        (":8080\n", None),
        ("a b:1", None),
    ],
)
def test_the_http_endpoint_is_host_and_port(endpoint: str, address: tuple[str, int] | None) -> None:
    settings = Settings(provisioner_name="a/b", http_endpoint=endpoint)
    assert settings.http_address() == address


@given(st.dictionaries(st.sampled_from([i.name for i in HostPathSettings.fields()]), st.text()))
def test_any_texts_give_settings_or_problems_with_flags(texts: dict[str, str]) -> None:
    found: list[str] = []
    settings = None
    try:
        settings = HostPathSettings.from_texts(NAME | texts)
    except Problems as error:
        found = error.problems
    assert (settings is None) == bool(found)
    assert settings is None or list(settings.validate()) == []
    flags = {info.flag for info in HostPathSettings.fields()}
    assert {problem.split(":")[0] for problem in found} <= flags
