"""The settings every provisioner has; its author adds fields by subclassing.

Each field is a flag (``--worker-threads``) and an environment variable (``WORKER_THREADS``); the
flag wins. The docstring under a field is its text in ``--help``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Self, dataclass_transform

from external_storage.fields import FieldInfo, Problems, Seconds, build, fields_of
from external_storage.logs import LogFormat

_LEVELS = ("debug", "info", "warning", "error")
_ENDPOINT = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:\s]*):([0-9]{1,5})", re.ASCII)
_LABEL = r"[a-z0-9A-Z]([-a-z0-9A-Z_.]{0,61}[a-z0-9A-Z])?"
_PROVISIONER_NAME = re.compile(rf"([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_LABEL}", re.ASCII)

__all__ = ["Problems", "Seconds", "Settings"]


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What an admin can set on any provisioner."""

    provisioner_name: str = ""
    """Name this provisioner answers to: the `provisioner` of its classes."""

    kubeconfig: str | None = None
    """Kubeconfig to use; without one the pod's own credentials, then ~/.kube/config."""

    master: str | None = None
    """Address of the API server, in place of the one found."""

    worker_threads: int = 4
    """Claims of one class worked at the same time, and volumes of one class deleted at the same
    time. Classes do not share this number: one with a slow backend does not hold up the others."""

    retry_interval_start: Seconds = Seconds(1.0)
    """Wait before the first retry of a failed claim or volume; doubled after each failure."""

    retry_interval_max: Seconds = Seconds(300.0)
    """Longest wait between two tries of one claim or volume."""

    timeout: Seconds = Seconds(120.0)
    """Deadline of one call into the backend, handed to the provisioner's code."""

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
        if not _PROVISIONER_NAME.fullmatch(self.provisioner_name):
            yield (
                f"--provisioner-name: {self.provisioner_name!r} is not a provisioner name: "
                "want vendor.example/name"
            )
        if not 1 <= self.worker_threads <= 1000:
            yield f"--worker-threads: {self.worker_threads} is not between 1 and 1000"
        if self.retry_interval_start <= 0:
            yield "--retry-interval-start: must be above 0"
        if self.retry_interval_max < self.retry_interval_start:
            yield "--retry-interval-max: is below --retry-interval-start"
        if self.timeout <= 0:
            yield "--timeout: must be above 0"
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
