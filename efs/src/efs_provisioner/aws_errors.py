"""What AWS answers instead of what was asked for, in words for people.

Every text names the IAM action or the API call, what AWS said, and what helps.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from external_storage import Infeasible, ProvisioningFailed, ProvisioningInBackground

_DENIED = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"})
_NOT_ACCEPTED = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "IncompleteSignature",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "MissingAuthenticationToken",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)
_THROTTLED = frozenset(
    {
        "BandwidthLimitExceeded",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "SlowDown",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)
_ACTION = re.compile(r"not authorized to perform: ([A-Za-z0-9-]+:[A-Za-z0-9*]+)")
_MAX_MESSAGE = 300


class AwsFailed(ProvisioningFailed):
    """AWS refused, or could not be asked: nothing was done."""


class AwsThrottled(AwsFailed):
    """Too many requests of this account at this moment."""


class AccessPointsExhausted(AwsFailed):
    """The file system has as many access points as it may have."""


class FileSystemNotReady(AwsFailed):
    """The file system is being made, changed or deleted."""


class FileSystemMissing(Infeasible):
    """There is no such file system in this account and region."""


class AwsRefused(Infeasible):
    """AWS does not take the request as it is."""


class AwsUncertain(ProvisioningInBackground):
    """Nobody knows whether AWS has done what it was asked for: ask again."""


class TokenUsed(Exception):
    """``CreateAccessPoint`` was called before with this token: ``access_point_id`` was made."""

    def __init__(self, access_point_id: str) -> None:
        super().__init__(f"made before: {access_point_id}")
        self.access_point_id = access_point_id


class AccessPointMissing(Exception):
    """There is no access point of this id."""


@cache
def _botocore() -> Any:  # noqa: ANN401  (it has no types)
    """The module with its exceptions; not imported before there is a call."""
    return importlib.import_module("botocore.exceptions")


def aws_exceptions() -> tuple[type[Exception], ...]:
    """What a call of AWS may raise, for ``except``."""
    return _botocore().BotoCoreError, _botocore().ClientError


@cache
def _unreached() -> tuple[type[Exception], ...]:
    """The request was never sent: whatever it was to do has not been done."""
    names = ("EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "SSLError")
    return tuple(getattr(_botocore(), name) for name in names)


@cache
def _no_credentials() -> tuple[type[Exception], ...]:
    names = (
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "TokenRetrievalError",
    )
    return tuple(getattr(_botocore(), name) for name in names)


_Words = Callable[[str, str], Exception]


def _limit(about: str, said: str) -> Exception:
    return AccessPointsExhausted(
        f"{about} has no room for another access point: delete volumes, or have AWS raise the "
        f"quota{said}"
    )


def _not_ready(about: str, said: str) -> Exception:
    return FileSystemNotReady(f"{about} is not available at this moment{said}")


def _no_file_system(about: str, said: str) -> Exception:
    return FileSystemMissing(f"{about} does not exist in this account and region{said}")


_BY_CODE: dict[str, _Words] = {
    "AccessPointLimitExceeded": _limit,
    "AccessPointNotFound": lambda about, _: AccessPointMissing(about),
    "FileSystemNotFound": _no_file_system,
    "IncorrectFileSystemLifeCycleState": _not_ready,
}


def code_of(error: BaseException) -> str:
    """The code of an error, for metrics: AWS's own, or the name of what came before an answer."""
    if isinstance(error, _botocore().ClientError):
        return str(error.response.get("Error", {}).get("Code") or "Unknown")
    return type(error).__name__


def is_uncertain(error: BaseException | None, status: int) -> bool:
    """Whether one attempt may have had an effect though no success was reported.

    ``error`` came instead of an answer with the HTTP ``status``.
    """
    if error is not None:
        return not isinstance(error, _unreached())
    return status >= 500


def translate(error: Exception, *, action: str, about: str) -> Exception:
    """What to raise for an error of boto3 after which it is certain that nothing was done.

    Args:
        action: the IAM action, such as ``elasticfilesystem:CreateAccessPoint``.
        about: what the call is about, for the text: ``file system fs-1``.
    """
    if isinstance(error, _botocore().ClientError):
        return _translate_answer(error, action, about)
    if isinstance(error, _no_credentials()):
        return AwsFailed(
            f"no AWS credentials for {action}: give the pod a role (IRSA, Pod Identity) or keys"
            f"{_said(str(error))}"
        )
    if isinstance(error, _botocore().NoRegionError):
        return AwsFailed("the AWS region is not known: set --aws-region")
    if isinstance(error, _unreached()):
        return AwsFailed(f"AWS cannot be reached for {action}{_said(str(error))}")
    if isinstance(error, _botocore().BotoCoreError):
        return AwsFailed(f"{action} of {about} failed{_said(str(error))}")
    return error


def _translate_answer(error: Any, action: str, about: str) -> Exception:  # noqa: ANN401
    code = code_of(error)
    answer: dict[str, Any] = dict(error.response)
    message = str(answer.get("Error", {}).get("Message") or answer.get("Message") or "")
    said = _said(message)
    if code == "AccessPointAlreadyExists" and answer.get("AccessPointId"):
        return TokenUsed(str(answer["AccessPointId"]))
    if code in _BY_CODE:
        return _BY_CODE[code](about, said)
    if code in _DENIED:
        found = _ACTION.search(message)
        return AwsFailed(
            f"AWS denies {found[1] if found else action} on {about}: add it to the IAM policy of "
            f"the provisioner's role{said}"
        )
    if code in _NOT_ACCEPTED:
        return AwsFailed(f"AWS does not accept the credentials ({code}) for {action}{said}")
    if code in _THROTTLED:
        return AwsThrottled(f"AWS throttles {action}: too many requests in this account ({code})")
    if code in ("BadRequest", "ValidationException"):
        return AwsRefused(f"AWS refuses {action} on {about} as it is{said}")
    return AwsFailed(f"{action} on {about} failed: {code}{said}")


def _said(message: str) -> str:
    text = " ".join(message.split())
    return f" (AWS: {text[:_MAX_MESSAGE]})" if text else ""
