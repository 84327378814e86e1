"""A fault layer of our own before moto's EFS: what AWS does, and moto (5.2) does not.

moto keeps the file systems, mount targets, access points and tags. Added here, after the API
reference of EFS: a ``ClientToken`` makes one access point, and its second use is refused with the
id of the first; unknown file systems, unknown access points and refused paths are errors; a file
system has a limit, a state, and lists of at most so many a page. Whatever else a test wants to go
wrong goes wrong here: denied, throttled, failed, or done with the answer lost.

Not tested by it is what only AWS can show: IAM's own judgement, timing, quotas.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
import urllib.parse
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import boto3
from moto.efs.models import efs_backends
from moto.server import ThreadedMotoServer

REGION = "us-east-1"
ACCOUNT = "123456789012"
_PREFIX = "/2015-02-01"
# Of the API reference, for RootDirectory.Path.
_PATH = re.compile(r"^(\/|(\/(?!\.)+[^$#<>;`|&?{}^*/\n]+){1,4})$")
_JSON = "application/json"
_Answer = tuple[int, bytes, dict[str, str]]


@dataclass(frozen=True)
class Call:
    """One request, as it was answered."""

    operation: str
    code: str
    """``ok``, the error's code, or ``lost`` when it was done and nobody was told."""


class FaultyEfs:
    """The server; start it, point ``AWS_ENDPOINT_URL`` at ``url``, stop it. From any threads."""

    def __init__(self) -> None:
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._lock = threading.RLock()
        self._server: ThreadingHTTPServer | None = None
        self.reset()

    # -- life

    def start(self) -> None:
        self._moto.start()
        self._server = _Server(("127.0.0.1", 0), self)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._moto.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """For a program that is to meet us in AWS's place."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
            # Else each refusal that is worth a retry costs seconds; our queue tries again anyway.
            "AWS_MAX_ATTEMPTS": "1",
        }

    def reset(self) -> None:
        """As at the beginning: without faults, calls and access points; file systems stay."""
        with self._lock:
            self.clear_faults()
            self.calls: list[Call] = []
            self._tokens: dict[str, str] = {}
            self._backend().access_points.clear()

    # -- faults

    def clear_faults(self) -> None:
        self.denied: set[str] = set()
        """Operations that the policy does not allow."""
        self.throttled: Counter[str] = Counter()
        """How many of the next attempts are too many, by operation."""
        self.failing: Counter[str] = Counter()
        """How many of the next attempts fail with 500, undone."""
        self.lost: Counter[str] = Counter()
        """How many of the next attempts are done, and their answers lost."""
        self.limit = 10_000
        """Access points a file system may have."""
        self.limits: dict[str, int] = {}
        """By file system, if it may have others."""
        self.page = 1000
        self.removed: set[str] = set()
        """File systems that somebody has deleted."""
        self.states: dict[str, str] = {}
        """By file system: its state, if it is not available."""

    # -- what there is

    def make_file_system(self, *, zone: str = "", targets: bool = False) -> str:
        """A new one; ``zone`` makes it a One Zone one, ``targets`` gives it mount targets."""
        efs = self._client("efs")
        extra: dict[str, Any] = {"AvailabilityZoneName": zone} if zone else {}
        made = efs.create_file_system(CreationToken=f"token-{len(self.file_systems())}", **extra)
        if targets:
            for subnet in self._client("ec2").describe_subnets()["Subnets"][:2]:
                efs.create_mount_target(
                    FileSystemId=made["FileSystemId"], SubnetId=subnet["SubnetId"]
                )
        return str(made["FileSystemId"])

    def file_systems(self) -> list[str]:
        return list(self._backend().file_systems_by_id)

    def targets(self, file_system: str) -> dict[str, str]:
        """Addresses by zone."""
        found = self._client("efs").describe_mount_targets(FileSystemId=file_system)
        return {t["AvailabilityZoneName"]: t["IpAddress"] for t in found["MountTargets"]}

    def access_points(self, file_system: str | None = None) -> list[dict[str, Any]]:
        """As ``DescribeAccessPoints`` has them; asked past the faults, and not counted."""
        with self._lock:
            backend = self._backend()
            return [p.info_json() for p in backend.describe_access_points(None, file_system)]

    def add_access_points(
        self, file_system: str, count: int, *, first_gid: int, path: str = ""
    ) -> None:
        """So many of somebody else's."""
        with self._lock:
            for number in range(count):
                user = {"Uid": first_gid + number, "Gid": first_gid + number}
                root = {"Path": path or f"/others/{number}"}
                self._backend().create_access_point(f"other-{number}", [], file_system, user, root)

    def delete_access_point(self, access_point: str) -> None:
        """As somebody does in the console."""
        with self._lock:
            self._backend().delete_access_point(access_point)

    def retag(self, access_point: str, key: str, value: str) -> None:
        """As somebody does in the console."""
        with self._lock:
            tags = [{"Key": key, "Value": value}]
            self._backend().tagging_service.tag_resource(access_point, tags)

    def operations(self) -> Counter[str]:
        """How often each operation was asked for."""
        return Counter(call.operation for call in self.calls)

    # -- answering

    def answer(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> _Answer | None:
        """Status, body and headers; None: the connection is cut."""
        operation = _operation(method, path)
        answer, code = self._judge(operation, method, path, body, headers)
        with self._lock:
            if code == "ok" and self._used(self.lost, operation):
                self.calls.append(Call(operation, "lost"))
                return None
            self.calls.append(Call(operation, code))
        return answer

    def _judge(
        self, operation: str, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[_Answer, str]:
        with self._lock:
            code = self._fault(operation)
            if code is not None:
                return _error(*code), code[1]
            if operation == "CreateAccessPoint":
                refused = self._refuse_create(json.loads(body))
            else:
                refused = self._refuse(operation, path)
            if refused is not None:
                return refused, refused[2]["x-amzn-ErrorType"]
            if operation == "DescribeAccessPoints":
                return self._page_of(path), "ok"
            answer = self._forward(method, path, body, headers)
            self._remember(operation, path, body, answer)
        return answer, "ok" if answer[0] < 400 else "moto"

    def _fault(self, operation: str) -> tuple[int, str, str] | None:
        if operation in self.denied:
            arn = f"arn:aws:iam::{ACCOUNT}:role/test"
            what = f"elasticfilesystem:{operation} on the specified resource"
            text = f"User: {arn} is not authorized to perform: {what}"
            return 403, "AccessDeniedException", text
        if self._used(self.throttled, operation):
            return 429, "ThrottlingException", "Rate exceeded"
        if self._used(self.failing, operation):
            return 500, "InternalServerError", "Try again"
        return None

    def _refuse_create(self, asked: dict[str, Any]) -> _Answer | None:
        id, token = asked["FileSystemId"], asked["ClientToken"]
        if not self._has(id):
            return _error(404, "FileSystemNotFound", f"File system '{id}' does not exist.")
        if self.states.get(id, "available") != "available":
            text = f"File system {id} is in the wrong state"
            return _error(409, "IncorrectFileSystemLifeCycleState", text)
        if token in self._tokens:
            return _error(
                409,
                "AccessPointAlreadyExists",
                "Access point already exists with the same client token",
                AccessPointId=self._tokens[token],
            )
        path = asked["RootDirectory"]["Path"]
        if not _PATH.fullmatch(path) or len(path) > 100:
            return _error(400, "BadRequest", f"invalid path {path}")
        limit = self.limits.get(id, self.limit)
        if len(self._backend().describe_access_points(None, id)) >= limit:
            text = f"You have reached the maximum of {limit} access points"
            return _error(403, "AccessPointLimitExceeded", text)
        return None

    def _refuse(self, operation: str, path: str) -> _Answer | None:
        parsed = urllib.parse.urlsplit(path)
        query = dict(urllib.parse.parse_qsl(parsed.query))
        point = query.get("AccessPointId", "")
        if operation == "DeleteAccessPoint":
            point = parsed.path.rsplit("/", 1)[1]
        if point and point not in self._backend().access_points:
            return _error(404, "AccessPointNotFound", f"Access point {point} does not exist.")
        id = query.get("FileSystemId", "")
        if id and not self._has(id):
            return _error(404, "FileSystemNotFound", f"File system '{id}' does not exist.")
        return None

    def _has(self, file_system: str) -> bool:
        is_known = file_system in self._backend().file_systems_by_id
        return is_known and file_system not in self.removed

    def _remember(self, operation: str, path: str, body: bytes, answer: _Answer) -> None:
        if answer[0] >= 400:
            return
        if operation == "CreateAccessPoint":
            token = json.loads(body)["ClientToken"]
            self._tokens[token] = json.loads(answer[1])["AccessPointId"]
        elif operation == "DeleteAccessPoint":
            gone = urllib.parse.urlsplit(path).path.rsplit("/", 1)[1]
            self._tokens = {t: point for t, point in self._tokens.items() if point != gone}

    def _page_of(self, path: str) -> _Answer:
        """Of moto's access points: it would send all of them each time."""
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(path).query))
        points = self._backend().describe_access_points(
            query.get("AccessPointId"), query.get("FileSystemId")
        )
        start = int(query.get("NextToken", 0))
        end = start + min(int(query.get("MaxResults", 100)), self.page)
        found = [point.info_json() for point in points[start:end]]
        content: dict[str, Any] = {"AccessPoints": found}
        if end < len(points):
            content["NextToken"] = str(end)
        return 200, json.dumps(content).encode(), {"Content-Type": _JSON}

    def _forward(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> _Answer:
        host, port = self._moto.get_host_and_port()
        connection = http.client.HTTPConnection(host, port, timeout=60)
        try:
            connection.request(method, path, body or None, headers)
            answer = connection.getresponse()
            kept = {"Content-Type": answer.getheader("Content-Type", _JSON)}
            if kind := answer.getheader("x-amzn-ErrorType"):
                kept["x-amzn-ErrorType"] = kind
            return answer.status, answer.read(), kept
        finally:
            connection.close()

    @staticmethod
    def _used(left: Counter[str], operation: str) -> bool:
        if left[operation] <= 0:
            return False
        left[operation] -= 1
        return True

    @staticmethod
    def _backend() -> Any:
        return efs_backends[ACCOUNT][REGION]

    def _client(self, service: Any) -> Any:
        host, port = self._moto.get_host_and_port()
        return boto3.client(
            service,
            region_name=REGION,
            endpoint_url=f"http://{host}:{port}",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )


def _operation(method: str, path: str) -> str:
    """The API's name of a request; ``other`` for what is not EFS's."""
    kind = urllib.parse.urlsplit(path).path.removeprefix(_PREFIX).strip("/").split("/")[0]
    verbs = {"GET": "Describe", "POST": "Create", "DELETE": "Delete"}
    names = {"access-points": "AccessPoint", "file-systems": "FileSystem"}
    names["mount-targets"] = "MountTarget"
    if kind not in names:
        return "other"
    return verbs[method] + names[kind] + ("s" if method == "GET" else "")


def _error(status: int, code: str, text: str, **more: str) -> _Answer:
    body = {"ErrorCode": code, "Message": text, **more}
    return status, json.dumps(body).encode(), {"Content-Type": _JSON, "x-amzn-ErrorType": code}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], efs: FaultyEfs) -> None:
        self.efs = efs
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
        answer = self.server.efs.answer(self.command, self.path, self.rfile.read(length), headers)
        if answer is None:
            self.close_connection = True
            return
        status, body, kept = answer
        self.send_response(status)
        for key, value in kept.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET
    do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing: the calls are kept."""
