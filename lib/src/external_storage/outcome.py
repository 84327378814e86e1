"""What the kinds of work have in common when a try ends, or may not begin."""

from __future__ import annotations

from external_storage.errors import ProvisionerError
from external_storage.kube.errors import KubeError
from external_storage.logs import Logger
from external_storage.persistent_volume import UnfitVolume
from external_storage.volume_store import SaveFailed

PAUSE_S = 5.0
"""How long claims and volumes wait while the provisioner's ``check`` says no."""


def log_failure(fields: Logger, message: str, error: BaseException, *, retry_in_s: float) -> None:
    """One line for what the contract foresees; a traceback for a defect, for its author."""
    facts = {"error": str(error), "retry_in_s": round(retry_in_s, 1)}
    if isinstance(error, (ProvisionerError, KubeError, SaveFailed, UnfitVolume)):
        fields.warning(message, **facts)
    else:
        fields.exception(message, exc=error, **facts)
