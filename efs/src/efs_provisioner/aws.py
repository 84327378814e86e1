"""The calls of AWS that we make; nothing else in this package knows boto3.

One session, and one client for each operation: botocore's adaptive limiter belongs to a client, so
what is throttled slows down nothing else. Credentials, region, endpoints and the number of attempts
come the usual way of boto3 (role of the pod, ``AWS_*``); nothing of them is a setting of ours.

boto3 is imported by the first call: it takes most of a second, and directories need none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from efs_provisioner.aws_errors import (
    AccessPointMissing,
    AwsUncertain,
    TokenUsed,
    aws_exceptions,
    code_of,
    is_uncertain,
    translate,
)

if TYPE_CHECKING:
    import boto3
    from botocore.config import Config
    from types_boto3_efs import EFSClient
    from types_boto3_efs.type_defs import (
        AccessPointDescriptionResponseTypeDef,
        AccessPointDescriptionTypeDef,
    )

Observer = Callable[[str, str, float], None]
"""Told of each attempt: operation, code (``ok`` or AWS's own), seconds."""

CONNECT_TIMEOUT_S: Final = 5.0
READ_TIMEOUT_S: Final = 20.0
"""Of one attempt, of which boto3 makes three: together well below ``--timeout``."""

_PAGE: Final = 1000
_READS: Final = frozenset({"DescribeAccessPoints", "DescribeFileSystems", "DescribeMountTargets"})
# By how the names of regions begin. Others, such as those of secret clouds, are not known to us.
_DNS_SUFFIXES: Final = {
    "cn-": "amazonaws.com.cn",
    "us-iso": "",
    "eu-iso": "",
    "eusc-": "",
    "": "amazonaws.com",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessPoint:
    """An access point, as far as we look at it."""

    id: str
    file_system: str
    path: str
    """Its root directory; ``/`` is the whole file system."""
    uid: int | None
    gid: int | None
    """Whom everybody is who mounts it; None: nobody in particular."""
    state: str
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystemFacts:
    """What AWS says of a file system."""

    id: str
    state: str
    zone: str
    """Its availability zone, of a One Zone file system; empty for a regional one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MountTarget:
    """Where a file system can be reached in one zone."""

    id: str
    zone: str
    address: str
    state: str


class Aws:
    """EFS in one region; safe to use from threads.

    Every method raises what ``aws_errors`` has: ``AwsFailed`` and its like if nothing was done,
    ``AwsUncertain`` if that is not known.
    """

    def __init__(self, region: str, *, observe: Observer = lambda *_: None) -> None:
        """``region``: empty for boto3's own way to find it. Does no I/O."""
        self._region = region
        self._observe = observe
        self._lock = threading.RLock()
        self._made_session: boto3.Session | None = None
        self._clients: dict[str, EFSClient] = {}
        self._attempts = threading.local()

    @property
    def region(self) -> str:
        """Empty if it is not known."""
        return self._region or self._session.region_name or ""

    def dns_name(self, file_system: str) -> str:
        """The name that a file system has in its VPC; empty where that cannot be told."""
        region = self.region
        suffix = next((s for start, s in _DNS_SUFFIXES.items() if region.startswith(start)), "")
        return f"{file_system}.efs.{region}.{suffix}" if region and suffix else ""

    # -- access points

    def create_access_point(
        self,
        *,
        token: str,
        file_system: str,
        path: str,
        uid: int,
        gid: int,
        permissions: str,
        tags: Mapping[str, str],
    ) -> AccessPoint:
        """Make one whose root directory EFS makes at the first mount, for its owner.

        Raises ``TokenUsed`` with the id of the one that the same token has made before.
        """
        with self._call("CreateAccessPoint", f"file system {file_system}") as client:
            made = client.create_access_point(
                ClientToken=token,
                FileSystemId=file_system,
                PosixUser={"Uid": uid, "Gid": gid},
                RootDirectory={
                    "Path": path,
                    "CreationInfo": {"OwnerUid": uid, "OwnerGid": gid, "Permissions": permissions},
                },
                Tags=[{"Key": key, "Value": value} for key, value in tags.items()],
            )
        return _access_point(made)

    def delete_access_point(self, access_point: str) -> None:
        """One that is gone is a success."""
        try:
            with self._call("DeleteAccessPoint", f"access point {access_point}") as client:
                client.delete_access_point(AccessPointId=access_point)
        except AccessPointMissing:
            return

    def find_access_point(self, access_point: str) -> AccessPoint | None:
        """None: there is none of this id."""
        try:
            with self._call("DescribeAccessPoints", f"access point {access_point}") as client:
                answer = client.describe_access_points(AccessPointId=access_point)
        except AccessPointMissing:
            return None
        found = answer["AccessPoints"]
        return _access_point(found[0]) if found else None

    def access_points(self, file_system: str = "") -> list[AccessPoint]:
        """All of a file system, or of the account in this region, a page of 1000 a call."""
        found: list[AccessPoint] = []
        asked: dict[str, Any] = {"FileSystemId": file_system} if file_system else {}
        about = f"file system {file_system}" if file_system else "all file systems"
        while True:
            with self._call("DescribeAccessPoints", about) as client:
                answer = client.describe_access_points(MaxResults=_PAGE, **asked)
            found += [_access_point(item) for item in answer["AccessPoints"]]
            asked["NextToken"] = answer.get("NextToken")
            if not asked["NextToken"]:
                return found

    # -- file systems

    def file_system(self, file_system: str) -> FileSystemFacts:
        """Raises ``FileSystemMissing``."""
        with self._call("DescribeFileSystems", f"file system {file_system}") as client:
            answer = client.describe_file_systems(FileSystemId=file_system)
        [found] = answer["FileSystems"]
        return FileSystemFacts(
            id=found["FileSystemId"],
            state=found["LifeCycleState"],
            zone=found.get("AvailabilityZoneName") or "",
        )

    def mount_targets(self, file_system: str) -> list[MountTarget]:
        """By zone. There is one in a zone at most, so one page has them all."""
        with self._call("DescribeMountTargets", f"file system {file_system}") as client:
            answer = client.describe_mount_targets(FileSystemId=file_system)
        found = [
            MountTarget(
                id=item["MountTargetId"],
                zone=item.get("AvailabilityZoneName") or "",
                address=item.get("IpAddress") or item.get("Ipv6Address") or "",
                state=item["LifeCycleState"],
            )
            for item in answer["MountTargets"]
        ]
        return sorted(found, key=lambda target: (target.zone, target.id))

    # -- for the doctor

    def identity(self) -> str:
        """The ARN that AWS takes us for; needs no permission."""
        try:
            client = self._session.client("sts", config=_config())
            return str(client.get_caller_identity()["Arn"])
        except aws_exceptions() as error:
            raise translate(error, action="sts:GetCallerIdentity", about="ourselves") from error

    # -- inside

    @property
    def _session(self) -> boto3.Session:
        with self._lock:
            if self._made_session is None:
                import boto3  # not before there is a call

                self._made_session = boto3.Session(region_name=self._region or None)
            return self._made_session

    @contextmanager
    def _call(self, operation: str, about: str) -> Iterator[EFSClient]:
        """Around one call, made of one attempt or several."""
        action = f"elasticfilesystem:{operation}"
        self._attempts.uncertain = False
        self._attempts.began = time.monotonic()
        try:
            yield self._client(operation)
        except aws_exceptions() as error:
            told = translate(error, action=action, about=about)
            certain = operation in _READS or isinstance(told, (TokenUsed, AccessPointMissing))
            if self._attempts.uncertain and not certain:
                raise AwsUncertain(
                    f"it is not known whether AWS has done {action} for {about}: {error}"
                ) from error
            raise told from error

    def _client(self, operation: str) -> EFSClient:
        with self._lock:
            if operation not in self._clients:
                client = self._session.client("efs", config=_config())
                # Told of every attempt; what it returns (None) leaves the retrying to botocore.
                client.meta.events.register(f"needs-retry.efs.{operation}", self._attempted)
                client.meta.events.register(f"before-send.efs.{operation}", self._sent)
                self._clients[operation] = client
            return self._clients[operation]

    def _sent(self, **_: object) -> None:
        """In the thread of the call, when an attempt is sent: after what botocore has waited."""
        self._attempts.began = time.monotonic()

    def _attempted(
        self,
        *,
        operation: Any,  # noqa: ANN401  (botocore has no types)
        response: Any,  # noqa: ANN401
        caught_exception: BaseException | None,
        **_: object,
    ) -> None:
        """In the thread of the call, after each of its attempts."""
        status, code = 0, ""
        if caught_exception is not None:
            code = code_of(caught_exception)
        elif response is not None:
            http, parsed = response
            status, code = http.status_code, parsed.get("Error", {}).get("Code") or "ok"
        if is_uncertain(caught_exception, status):
            self._attempts.uncertain = True
        self._observe(operation.name, code, time.monotonic() - self._attempts.began)


def _config() -> Config:
    from botocore.config import Config  # not before there is a call

    return Config(
        retries={"mode": "adaptive"},
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        user_agent_extra="external-storage-efs",
    )


def _access_point(
    item: AccessPointDescriptionTypeDef | AccessPointDescriptionResponseTypeDef,
) -> AccessPoint:
    user = item.get("PosixUser")
    return AccessPoint(
        id=item["AccessPointId"],
        file_system=item["FileSystemId"],
        path=item.get("RootDirectory", {}).get("Path") or "/",
        uid=user["Uid"] if user else None,
        gid=user["Gid"] if user else None,
        state=item.get("LifeCycleState", ""),
        tags={tag["Key"]: tag["Value"] for tag in item.get("Tags", [])},
    )
