"""What an author's code raises to say what happened.

An exception raised ``from`` one of these counts as that one.
"""

from __future__ import annotations


class ProvisionerError(Exception):
    """Base of what ``provision`` and ``delete`` may raise; the text is shown to the user."""


class ProvisioningFailed(ProvisionerError):
    """It failed and nothing is running or left behind; try again with back-off."""


class ProvisioningInBackground(ProvisionerError):
    """The backend may still be at work: ask again until it has ended one way or the other."""


class Unchanged(ProvisionerError):
    """The backend could not even be asked; what was true before this try is still true."""


class Reschedule(ProvisionerError):
    """Not possible on the selected node: let the scheduler choose again."""


class Infeasible(ProvisionerError):
    """Cannot succeed until the claim or its class is changed: retry slowly."""


class Ignored(ProvisionerError):
    """Not ours after all, on purpose and without an event: leave it alone."""


class VolumeInUse(ProvisionerError):
    """From ``delete``: something still uses the volume, which is normal; try again quietly."""


class CannotStart(ProvisionerError):
    """From ``start``: what the admin has to change; the process ends with exit code 1."""


def meant(error: BaseException) -> BaseException:
    """``error``, or the ``ProvisionerError`` it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ProvisionerError):
            return cause
        cause = cause.__cause__
    return error
