"""What can go wrong between us and the API server, as types a caller can act on.

The text of each error is cut to 256 characters: servers and proxies answer with whole pages, and
these texts end in events and log lines.
"""

from __future__ import annotations

import msgspec

MAX_TEXT = 256


def cut(text: str, limit: int = MAX_TEXT) -> str:
    """``text`` on one line and at most ``limit`` characters long."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


class KubeError(Exception):
    """Anything that kept a request to the API server from succeeding."""

    def __init__(self, text: str) -> None:
        super().__init__(cut(text))


class ConfigError(KubeError):
    """The credentials or the address of the API server cannot be used as they are."""


class NotAllowed(KubeError):
    """Not sent: who may write is somebody else at this moment."""


class Unavailable(KubeError):
    """No usable answer: refused, cut or timed out. The request may have been carried out."""


class StatusError(KubeError):
    """The API server answered with an error.

    Attributes:
        code: the HTTP status code.
        reason: the machine-readable reason of the Status object, ``""`` if there was none.
        retry_after_s: seconds the server asked us to wait, ``None`` if it did not.
    """

    def __init__(
        self, text: str, *, code: int, reason: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(f"{code} {reason or 'error'}: {text}")
        self.code = code
        self.reason = reason
        self.retry_after_s = retry_after_s


class BadRequest(StatusError):
    """400: the request cannot be understood; sending it again cannot help."""


class Unauthorized(StatusError):
    """401: the credentials are missing, expired or wrong."""


class Forbidden(StatusError):
    """403: RBAC or an admission plugin refuses; an admin can change that at any time."""


class NotFound(StatusError):
    """404: the object or the API does not exist."""


class Conflict(StatusError):
    """409: a precondition (UID, resource version) does not hold."""


class AlreadyExists(Conflict):
    """409 on a create: an object of that name is there, not necessarily ours."""


class Gone(StatusError):
    """410: the resource version or the continue token is too old; list again."""


class Invalid(StatusError):
    """422: the object violates the API's rules; it can never be saved as it is."""


class TooManyRequests(StatusError):
    """429: the server's priority and fairness asks us to slow down."""


class ServerError(StatusError):
    """5xx: the server's trouble; the request may have been carried out."""


class StatusCause(msgspec.Struct, rename="camel"):
    """One field that an object was refused for."""

    field: str = ""
    reason: str = ""


class StatusDetails(msgspec.Struct, rename="camel"):
    causes: list[StatusCause] = []


class Status(msgspec.Struct, rename="camel"):
    """The ``Status`` object that the API server sends with an error."""

    message: str = ""
    reason: str = ""
    code: int = 0
    details: StatusDetails = msgspec.field(default_factory=StatusDetails)


_BY_CODE: dict[int, type[StatusError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    422: Invalid,
    429: TooManyRequests,
}
# What msgspec raises for input that is not what it should be: no JSON, no UTF-8, nested too deep.
DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_decode_status = msgspec.json.Decoder(Status).decode


def from_status(status: Status, *, retry_after_s: float | None = None) -> StatusError:
    """The exception for a Status object, as a response or as the ERROR event of a watch."""
    if status.reason == "AlreadyExists":
        kind: type[StatusError] = AlreadyExists
    elif status.reason == "Expired":
        kind = Gone
    elif any(cause.field == "metadata.uid" for cause in status.details.causes):
        # A patch whose UID is another object's: refused as a change of an immutable field (422).
        kind = Conflict
    else:
        default = ServerError if status.code >= 500 else StatusError
        kind = _BY_CODE.get(status.code, default)
    text = status.message or "no message"
    return kind(text, code=status.code, reason=status.reason, retry_after_s=retry_after_s)


def from_response(code: int, body: bytes, *, retry_after_s: float | None = None) -> StatusError:
    """The exception for a response of status ``code``; ``body`` need not be a Status object."""
    try:
        status = _decode_status(body)
    except DECODE_ERRORS:
        status = Status(message=body.decode("utf-8", "replace"))
    status.code = code
    return from_status(status, retry_after_s=retry_after_s)
