"""What the kinds of work have in common when a try ends, or may not begin."""

from __future__ import annotations

from external_storage.errors import ProvisionerError, ProvisioningInBackground, Unchanged
from external_storage.events import EventType
from external_storage.kube.errors import KubeError, NotAllowed
from external_storage.logs import Logger
from external_storage.persistent_volume import UnfitVolume
from external_storage.volume_store import SaveFailed

PAUSE_S = 5.0
"""How long claims and volumes wait while the provisioner's ``check`` says no."""
LOST_LEASE_S = 1.0
"""How long a key waits that was in work when the lease was lost; its queue is paused by then."""


def lost_lease(error: BaseException) -> bool:
    """Whether it failed only because another replica leads: nothing for the user to know, and no
    failure of the claim or the volume."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, NotAllowed):
        cause = cause.__cause__
    return cause is not None


def log_failure(fields: Logger, message: str, error: BaseException, *, retry_in_s: float) -> None:
    """One line for what the contract foresees; a traceback for a defect, for its author."""
    facts = {"error": str(error), "retry_in_s": round(retry_in_s, 1)}
    if isinstance(error, (ProvisionerError, KubeError, SaveFailed, UnfitVolume)):
        fields.warning(message, **facts)
    else:
        fields.exception(message, exc=error, **facts)


def failure_event(
    error: BaseException, *, slow: bool, given_up_after: int
) -> tuple[EventType, str, str]:
    """What the user of a claim is told of a try that failed: type, reason, text.

    ``given_up_after``: the number of tries that were enough, 0 if another one follows.
    """
    text = (str(error) or type(error).__name__).rstrip(".")
    if given_up_after:
        text += f". Given up after {given_up_after} tries, until the claim or its class changes"
    elif isinstance(error, (ProvisioningInBackground, Unchanged)):
        return EventType.NORMAL, "ProvisioningInProgress", text
    elif slow:
        text += ". It is tried again when the claim or its class changes, else only slowly."
    return EventType.WARNING, "ProvisioningFailed", text
