"""The settings every provisioner has; its author adds fields by subclassing.

Each field is a flag (``--worker-threads``) and an environment variable (``WORKER_THREADS``); the
flag wins. The docstring under a field is its text in ``--help``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Self, dataclass_transform

from external_storage import volume_name
from external_storage.fields import FieldInfo, Problems, Seconds, build, fields_of
from external_storage.logs import LogFormat

_LEVELS = ("debug", "info", "warning", "error")
_NAMES = ("provisioner_name", "additional_provisioner_names")
_ENDPOINT = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:\s]*):([0-9]{1,5})", re.ASCII)
_LABEL = r"[a-z0-9A-Z]([-a-z0-9A-Z_.]{0,61}[a-z0-9A-Z])?"
_PROVISIONER_NAME = re.compile(rf"([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_LABEL}", re.ASCII)

__all__ = ["Problems", "ProgramSettings", "Seconds", "Settings"]


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramSettings:
    """What an admin can set on any program of the project, also on one that serves no claims."""

    kubeconfig: str | None = None
    """Kubeconfig to use; without one the pod's own credentials, then ~/.kube/config."""

    master: str | None = None
    """Address of the API server, in place of the one found."""

    kube_api_qps: float = 0.0
    """Requests a second to the API server at most; 0 leaves it to the server to slow us down."""

    kube_api_burst: int = 10
    """Requests that may go at once before `--kube-api-qps` counts."""

    shutdown_timeout: Seconds = Seconds(25.0)
    """How long work in progress may go on after SIGTERM; below the pod's grace period of 30 s."""

    http_endpoint: str = ""
    """Address of /healthz, /readyz and the metrics, such as `:8080`; empty for none."""

    metrics_path: str = "/metrics"
    """Path of the metrics on the HTTP endpoint."""

    log_format: LogFormat = LogFormat.TEXT
    """`text` for people or `json` for machines."""

    log_level: str = "info"
    """`debug`, `info`, `warning` or `error`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    @classmethod
    def fields(cls) -> tuple[FieldInfo, ...]:
        """All fields in order, the author's after the library's."""
        return fields_of(cls)

    @classmethod
    def from_texts(
        cls, texts: Mapping[str, str], *, called: Mapping[str, str] | None = None
    ) -> Self:
        """Build from texts by field name; ``Problems`` names the flag of each bad value, or what
        ``called`` says its text came from."""
        names = {info.name: info.flag for info in cls.fields()} | dict(called or {})
        built: Self = build(cls, texts, names)
        return built

    def validate(self) -> Iterable[str]:
        """What is wrong, a sentence for each problem; an override yields from ``super()`` first."""
        if self.kube_api_qps < 0:
            yield "--kube-api-qps: is below 0"
        if self.kube_api_burst < 1:
            yield "--kube-api-burst: must be at least 1"
        if self.http_endpoint and self.http_address() is None:
            yield f"--http-endpoint: {self.http_endpoint!r} is not HOST:PORT or :PORT"
        if not self.metrics_path.startswith("/"):
            yield f"--metrics-path: {self.metrics_path!r} does not begin with /"
        if self.log_level.lower() not in _LEVELS:
            yield f"--log-level: {self.log_level!r} is not one of: {', '.join(_LEVELS)}"

    def http_address(self) -> tuple[str, int] | None:
        """Host (empty: every address) and port of the HTTP endpoint; None without a valid one."""
        match = _ENDPOINT.fullmatch(self.http_endpoint)
        if match is None or int(match[2]) > 65535:
            return None
        return match[1].strip("[]"), int(match[2])


class Settings(ProgramSettings):
    """What an admin can set on any provisioner."""

    provisioner_name: str = ""
    """Name this provisioner answers to: the `provisioner` of its classes."""

    additional_provisioner_names: tuple[str, ...] = ()
    """Other names to answer to, separated by commas, such as the one that a predecessor had."""

    worker_threads: int = 4
    """Claims of one class worked at the same time, and volumes of one class deleted at the same
    time. Classes do not share this number: one with a slow backend does not hold up the others."""

    retry_interval_start: Seconds = Seconds(1.0)
    """Wait before the first retry of a failed claim or volume; doubled after each failure."""

    retry_interval_max: Seconds = Seconds(300.0)
    """Longest wait between two tries of one claim or volume."""

    failed_provision_threshold: int = 0
    """Tries for a claim before it is left alone until it or its class changes; 0: for ever."""

    failed_delete_threshold: int = 0
    """Tries to delete a volume before it is left alone until it changes; 0: for ever."""

    timeout: Seconds = Seconds(120.0)
    """Deadline of one call into the backend, handed to the provisioner's code."""

    volume_name_template: str = "pvc-${.PVC.uid}"
    """Names of new volumes; knows `${.PVC.uid}`, which must be in it, `${.PVC.namespace}` and
    `${.PVC.name}`."""

    capacity_poll_interval: Seconds = Seconds(60.0)
    """How often the back end is asked what is left, for the scheduler; at once after each change of
    ours. Only for provisioners that know it, whose name has a CSIDriver with storageCapacity."""

    lenient_parameters: bool = False
    """Take unknown class parameters with a Warning event, for classes that already exist."""

    leader_elect: bool = True
    """Work only while holding the lease of this provisioner name, so that replicas take over from
    each other. Without it nothing is written periodically, and there must be one replica only."""

    leader_elect_lease_duration: Seconds = Seconds(15.0)
    """How long others wait after the last renewal before they take the lease."""

    leader_elect_renew_deadline: Seconds = Seconds(10.0)
    """How long the leader goes on working without having renewed; below the lease duration."""

    leader_elect_retry_period: Seconds = Seconds(4.0)
    """Wait between two renewals, and between two looks of those who wait for the lease."""

    leader_elect_resource_name: str = ""
    """Name of the lease; by default the provisioner name with `-` for `/`."""

    leader_elect_resource_namespace: str = ""
    """Namespace of the lease; by default the pod's own."""

    @classmethod
    def fields(cls) -> tuple[FieldInfo, ...]:
        """All fields in order, the names first, and the author's after the library's."""
        return tuple(sorted(fields_of(cls), key=lambda info: info.name not in _NAMES))

    def validate(self) -> Iterable[str]:
        """What is wrong, a sentence for each problem; an override yields from ``super()`` first."""
        if not _PROVISIONER_NAME.fullmatch(self.provisioner_name):
            yield (
                f"--provisioner-name: {self.provisioner_name!r} is not a provisioner name: "
                "want vendor.example/name"
            )
        for name in self.additional_provisioner_names:
            if not _PROVISIONER_NAME.fullmatch(name):
                yield f"--additional-provisioner-names: {name!r} is not a provisioner name"
        if not 1 <= self.worker_threads <= 1000:
            yield f"--worker-threads: {self.worker_threads} is not between 1 and 1000"
        if self.retry_interval_start <= 0:
            yield "--retry-interval-start: must be above 0"
        if self.retry_interval_max < self.retry_interval_start:
            yield "--retry-interval-max: is below --retry-interval-start"
        if self.failed_provision_threshold < 0:
            yield "--failed-provision-threshold: is below 0"
        if self.failed_delete_threshold < 0:
            yield "--failed-delete-threshold: is below 0"
        for problem in volume_name.problems(self.volume_name_template):
            yield f"--volume-name-template: {problem}"
        if self.capacity_poll_interval < 1:
            yield "--capacity-poll-interval: must be at least 1 s"
        yield from self._lease_problems()
        if self.timeout <= 0:
            yield "--timeout: must be above 0"
        yield from super().validate()

    def _lease_problems(self) -> Iterable[str]:
        if self.leader_elect_retry_period <= 0:
            yield "--leader-elect-retry-period: must be above 0"
        if self.leader_elect_renew_deadline <= 1.2 * self.leader_elect_retry_period:
            yield "--leader-elect-renew-deadline: must be above 1.2 times the retry period"
        if self.leader_elect_lease_duration <= self.leader_elect_renew_deadline:
            yield "--leader-elect-lease-duration: must be above --leader-elect-renew-deadline"
        if self.leader_elect_lease_duration < 1:
            yield "--leader-elect-lease-duration: must be at least 1 s"

    @property
    def names(self) -> tuple[str, ...]:
        """All provisioner names to answer to."""
        return (self.provisioner_name, *self.additional_provisioner_names)
