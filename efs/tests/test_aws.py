"""What AWS may answer, and what is made of it: the calls alone, without the library."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from botocore.retries.adaptive import ClientRateLimiter

from efs_provisioner.aws import AccessPoint, Aws
from efs_provisioner.aws_errors import (
    AccessPointsExhausted,
    AwsFailed,
    AwsRefused,
    AwsThrottled,
    AwsUncertain,
    FileSystemMissing,
    FileSystemNotReady,
    TokenUsed,
)
from external_storage import Infeasible, ProvisioningFailed, ProvisioningInBackground

if TYPE_CHECKING:
    from tests.faulty_efs import FaultyEfs


@pytest.fixture
def aws(efs: FaultyEfs) -> Aws:
    return Aws("us-east-1")


@pytest.fixture
def file_system(efs: FaultyEfs) -> str:
    return efs.make_file_system()


def create(aws: Aws, file_system: str, **changed: Any) -> AccessPoint:
    wanted: dict[str, Any] = {
        "token": "token",
        "file_system": file_system,
        "path": "/volume",
        "uid": 50_000,
        "gid": 50_001,
        "permissions": "700",
        "tags": {"key": "value"},
    }
    return aws.create_access_point(**{**wanted, **changed})


def test_an_access_point_is_what_was_asked_for(aws: Aws, file_system: str) -> None:
    made = create(aws, file_system)
    assert made.file_system == file_system
    assert (made.path, made.uid, made.gid) == ("/volume", 50_000, 50_001)
    assert made.tags == {"key": "value"}
    assert aws.find_access_point(made.id) == made
    assert aws.access_points(file_system) == [made]
    aws.delete_access_point(made.id)
    assert aws.find_access_point(made.id) is None


def test_deleting_what_is_gone_is_a_success(aws: Aws, efs: FaultyEfs) -> None:
    aws.delete_access_point("fsap-0123456789abcdef0")
    assert [call.code for call in efs.calls] == ["AccessPointNotFound"]


def test_a_token_used_twice_tells_the_first_access_point(aws: Aws, file_system: str) -> None:
    made = create(aws, file_system)
    with pytest.raises(TokenUsed) as refused:
        create(aws, file_system, path="/another")
    assert refused.value.access_point_id == made.id


def test_all_pages_are_read(aws: Aws, efs: FaultyEfs, file_system: str) -> None:
    efs.add_access_points(file_system, 25, first_gid=1000)
    efs.page = 10
    assert len({point.id for point in aws.access_points(file_system)}) == 25
    assert efs.operations() == {"DescribeAccessPoints": 3}


def limit(efs: FaultyEfs, _: str) -> None:
    efs.limit = 0


def deleting(efs: FaultyEfs, file_system: str) -> None:
    efs.states[file_system] = "deleting"


def throttled(efs: FaultyEfs, _: str) -> None:
    efs.throttled["CreateAccessPoint"] = 1


def denied(efs: FaultyEfs, _: str) -> None:
    efs.denied.add("CreateAccessPoint")


@pytest.mark.parametrize(
    ("arrange", "kind", "told"),
    [
        (limit, AccessPointsExhausted, "no room for another access point"),
        (deleting, FileSystemNotReady, "not available"),
        (throttled, AwsThrottled, "throttles elasticfilesystem:CreateAccessPoint"),
        (denied, AwsFailed, "denies elasticfilesystem:CreateAccessPoint.*IAM policy"),
    ],
)
def test_a_refusal_says_what_was_refused_and_what_helps(
    aws: Aws,
    efs: FaultyEfs,
    file_system: str,
    arrange: Callable[[FaultyEfs, str], None],
    kind: type[Exception],
    told: str,
) -> None:
    arrange(efs, file_system)
    with pytest.raises(kind, match=told) as refused:
        create(aws, file_system)
    assert isinstance(refused.value, ProvisioningFailed)
    assert efs.access_points(file_system) == []


def test_a_file_system_that_is_not_there_needs_another_class(aws: Aws) -> None:
    with pytest.raises(FileSystemMissing, match="fs-0123456789abcdef0 does not exist") as refused:
        create(aws, "fs-0123456789abcdef0")
    assert isinstance(refused.value, Infeasible)


def test_a_path_that_aws_refuses_is_told_in_its_words(aws: Aws, file_system: str) -> None:
    with pytest.raises(AwsRefused, match=r"invalid path /a/b/c/d/e"):
        create(aws, file_system, path="/a/b/c/d/e")


@pytest.mark.parametrize("fault", ["lost", "failing"])
def test_without_an_answer_nobody_knows_what_was_made(
    aws: Aws, efs: FaultyEfs, file_system: str, fault: str
) -> None:
    getattr(efs, fault)["CreateAccessPoint"] = 1
    with pytest.raises(AwsUncertain, match="not known whether") as uncertain:
        create(aws, file_system)
    assert isinstance(uncertain.value, ProvisioningInBackground)


def test_a_refusal_after_a_lost_answer_is_no_certainty(
    efs: FaultyEfs, file_system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    efs.failing["CreateAccessPoint"] = 1
    efs.limit = 0
    # The second attempt is botocore's own: the first one may have been what reached the limit.
    with pytest.raises(AwsUncertain):
        create(Aws("us-east-1"), file_system)
    codes = [call.code for call in efs.calls]
    assert codes == ["InternalServerError", "AccessPointLimitExceeded"]


def test_the_token_after_a_lost_answer_tells_what_was_made(
    efs: FaultyEfs, file_system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    efs.lost["CreateAccessPoint"] = 1
    with pytest.raises(TokenUsed) as told:
        create(Aws("us-east-1"), file_system)
    [made] = efs.access_points(file_system)
    assert told.value.access_point_id == made["AccessPointId"]


def test_a_read_that_fails_leaves_nothing_uncertain(
    aws: Aws, efs: FaultyEfs, file_system: str
) -> None:
    efs.failing["DescribeAccessPoints"] = 1
    with pytest.raises(AwsFailed):
        aws.access_points(file_system)


def test_what_is_not_reached_was_not_done(
    efs: FaultyEfs, file_system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(AwsFailed, match="cannot be reached"):
        create(Aws("us-east-1"), file_system)


def test_missing_credentials_and_regions_are_told(
    efs: FaultyEfs, file_system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(AwsFailed, match="no AWS credentials"):
        create(Aws("us-east-1"), file_system)
    with pytest.raises(AwsFailed, match="--aws-region"):
        create(Aws(""), file_system)


def test_every_attempt_is_counted_with_its_code(
    efs: FaultyEfs, file_system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    efs.throttled["CreateAccessPoint"] = 1
    seen: list[tuple[str, str]] = []
    made = create(Aws("us-east-1", observe=lambda *what: seen.append(what[:2])), file_system)
    assert seen == [("CreateAccessPoint", "ThrottlingException"), ("CreateAccessPoint", "ok")]
    assert [point["AccessPointId"] for point in efs.access_points(file_system)] == [made.id]


def test_throttling_of_one_operation_slows_down_no_other(
    efs: FaultyEfs, file_system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    limited: dict[str, bool] = {}
    sending = ClientRateLimiter.on_sending_request

    def seen(limiter: Any, request: Any, *, event_name: str, **given: Any) -> None:
        sending(limiter, request, event_name=event_name, **given)
        limited[event_name.rpartition(".")[2]] = limiter._enabled

    monkeypatch.setattr(ClientRateLimiter, "on_sending_request", seen)
    aws = Aws("us-east-1")
    efs.throttled["CreateAccessPoint"] = 1
    create(aws, file_system)
    aws.access_points(file_system)
    assert limited == {"CreateAccessPoint": True, "DescribeAccessPoints": False}


def test_the_duration_of_a_request_is_without_what_botocore_waits_before_it(
    efs: FaultyEfs, file_system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    now = [0.0]

    def sleep(_: float) -> None:
        now[0] += 100.0

    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr("efs_provisioner.aws.time", SimpleNamespace(monotonic=lambda: now[0]))
    efs.failing["DescribeAccessPoints"] = 1
    seen: list[float] = []
    Aws("us-east-1", observe=lambda *what: seen.append(what[2])).access_points(file_system)
    assert (now, seen) == ([100.0], [0.0, 0.0])


def test_boto3_is_not_imported_before_there_is_a_call() -> None:
    """Each process of a program for directories would take most of a second longer to start."""
    code = """
import sys
import efs_provisioner.__main__
from efs_provisioner.aws import Aws
assert Aws("us-east-1").dns_name("fs-01234567")
assert not {"boto3", "botocore"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_zones_and_mount_targets_are_read(aws: Aws, efs: FaultyEfs) -> None:
    id = efs.make_file_system(zone="us-east-1b", targets=True)
    assert aws.file_system(id).zone == "us-east-1b"
    assert {t.zone: t.address for t in aws.mount_targets(id)} == efs.targets(id)
    assert {t.state for t in aws.mount_targets(id)} == {"available"}


def test_it_knows_who_it_is(aws: Aws) -> None:
    assert aws.identity().startswith("arn:aws")


@pytest.mark.parametrize(
    ("region", "name"),
    [
        ("us-east-1", "fs-01234567.efs.us-east-1.amazonaws.com"),
        ("cn-north-1", "fs-01234567.efs.cn-north-1.amazonaws.com.cn"),
        ("us-gov-west-1", "fs-01234567.efs.us-gov-west-1.amazonaws.com"),
        ("us-iso-east-1", ""),
    ],
)
def test_the_dns_name_is_that_of_the_partition(region: str, name: str) -> None:
    assert Aws(region).dns_name("fs-01234567") == name
