"""What ``efs-provisioner doctor`` looks at: each thing that can be missing, one after the other."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from efs_provisioner.aws import Aws
from efs_provisioner.aws_errors import TokenUsed
from efs_provisioner.file_systems import FileSystem
from efs_provisioner.provisioner import owner_of, shares_of
from efs_provisioner.settings import EfsSettings
from efs_provisioner.tags import CLUSTER, NAME
from external_storage import ProvisionerError
from external_storage.kube.client import Client
from external_storage.shares import ShareDirectories

_LOOK_S: Final = 30.0
_PROBE_ID: Final = 65_534
_AVAILABLE: Final = "available"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    good: bool | None
    """None: neither, or not looked at."""
    text: str


def examine(settings: EfsSettings, client: Client, *, writes: bool) -> Iterator[Finding]:
    """Look at everything; nothing that fails keeps the rest from being looked at.

    ``writes``: make an access point on each file system and delete it again.
    """
    aws = Aws(settings.aws_region)
    yield _look("cluster", lambda: owner_of(settings, client).cluster)
    yield _look("AWS identity", aws.identity)
    systems = settings.read_file_systems().found(aws.dns_name)
    shares = shares_of(
        systems.values(),
        owner=lambda: owner_of(settings, client).of_records(),
        call_limit_s=settings.call_timeout,
    )
    for id, system in systems.items():
        yield _look(f"{id}: DescribeFileSystems", partial(_state, aws, id))
        yield _look(f"{id}: DescribeMountTargets", partial(_targets, aws, id))
        yield _look(f"{id}: DescribeAccessPoints", partial(_count, aws, id))
        yield from _try_writing(aws, id) if writes else ()
        yield _look(f"{id}: DNS", partial(_resolve, system))
        yield _mount(system, shares.get(id))


def _look(what: str, ask: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, ask())
    except (ProvisionerError, OSError) as error:
        return Finding(what, False, str(error))


def _state(aws: Aws, file_system: str) -> str:
    facts = aws.file_system(file_system)
    where = f"One Zone in {facts.zone}" if facts.zone else "regional"
    if facts.state != _AVAILABLE:
        raise ProvisionerError(f"{facts.state}, {where}: want {_AVAILABLE}")
    return f"{facts.state}, {where}"


def _targets(aws: Aws, file_system: str) -> str:
    targets = aws.mount_targets(file_system)
    shown = ", ".join(f"{t.zone} {t.address} {t.state}" for t in targets)
    if not any(target.state == _AVAILABLE for target in targets):
        raise ProvisionerError(f"none is available: no node can mount it ({shown or 'none'})")
    return shown


def _count(aws: Aws, file_system: str) -> str:
    return f"{len(aws.access_points(file_system))} access points"


def _try_writing(aws: Aws, file_system: str) -> Iterator[Finding]:
    name = f"efs-provisioner-doctor-{secrets.token_hex(8)}"
    made: list[str] = []

    def create() -> str:
        try:
            point = aws.create_access_point(
                token=name,
                file_system=file_system,
                path=f"/{name}",  # made by EFS at the first mount, so never
                uid=_PROBE_ID,
                gid=_PROBE_ID,
                permissions="700",
                # Without it our IAM policy permits neither call.
                tags={NAME: name, CLUSTER: "doctor"},
            )
        except TokenUsed as used:  # botocore's second attempt, after an answer that was lost
            made.append(used.access_point_id)
        else:
            made.append(point.id)
        return made[0]

    def delete() -> str:
        aws.delete_access_point(made[0])
        return made[0]

    yield _look(f"{file_system}: CreateAccessPoint", create)
    if made:
        yield _look(f"{file_system}: DeleteAccessPoint", delete)


def _resolve(system: FileSystem) -> str:
    if not system.server:
        raise ProvisionerError("the name is not known: set --aws-region or --dns-name")
    try:
        found = socket.getaddrinfo(system.server, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ProvisionerError(
            f"{system.server} cannot be resolved here: {error}; volumes are mounted by that name"
        ) from error
    return f"{system.server} is {', '.join(sorted({str(entry[4][0]) for entry in found}))}"


def _mount(system: FileSystem, share: ShareDirectories | None) -> Finding:
    what = f"{system.id}: mount"
    if share is None:
        return Finding(what, None, "not mounted here: no directories, access points only")
    share.share.start()
    try:
        looked = share.share.wait_looked_at(_LOOK_S)
        problem = share.problem() if looked else f"no answer within {_LOOK_S:.0f} s"
    finally:
        share.share.stop()
    where = f"{system.server}:{system.path} at {system.mount_point}"
    return Finding(what, problem is None, problem or where)
