"""Requests as JSON lines on stdin, answers on stdout, until stdin ends.

In: ``{"id", "op", "args", "limit_s"}``. Out: first ``{"hello": {...}}`` or ``{"fatal": text}``,
then ``{"id", "result"}`` or ``{"id", "error": {"kind", "text"}}``. Secrets come in that way only,
and never go out. A request whose line is cut off is not begun.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from iscsi_targetd_provisioner.host.common import NAME, OWNER, POOL, Refused
from iscsi_targetd_provisioner.host.diagnose import Diagnosis
from iscsi_targetd_provisioner.host.lio import Lio
from iscsi_targetd_provisioner.host.lvm import Lvm, Owners

PROTOCOL = 2
OWN_LOCK = "/run/external-storage-iscsi.lock"
TARGETCLI_LOCK = "/var/run/targetcli.lock"
BATCH = 32
CHANGE_S = 15.0
"""A change is not begun with less time left, nor with less than half of what it was given: the
commands of LVM are not stopped once they are begun."""
CHANGING = frozenset({"create", "destroy", "resize", "export", "unexport", "set_auth"})

_NO_TIME = "the requests before it have taken all its time"

Request = dict[str, Any]
"""As it came, with ``came``, when it did."""
Answer = dict[str, Any]


class Server:
    """Works requests one after the other: neither LVM nor LIO has any use for more at once."""

    def __init__(self, lio: Lio, pools: Iterable[str] = ()) -> None:
        """``pools``: the only ones that may be asked for; none: all."""
        self.allowed = frozenset(pools)
        self.until = 0.0
        self.lio = lio
        self.lvm = Lvm(self.left)
        self.ours: set[str] = set()
        """Volumes that are known to be ours: made, or looked at, by this process."""
        self.ops: dict[str, Callable[..., Any]] = {
            "pools": self.pools,
            "volumes": lambda owner: self.lvm.volumes(_owner(owner)),
            "exports": self.lio.exports,
            "create": self.create,
            "destroy": self.destroy,
            "resize": self.resize,
            "export": self.export,
            "unexport": self.unexport,
            "set_auth": self.set_auth,
            "diagnose": lambda **args: Diagnosis(self.lvm, self.lio).findings(**args),
        }

    def left(self) -> float:
        """Seconds until the request that is worked has to be over."""
        return max(self.until - time.monotonic(), 0.0)

    # -- requests

    def pools(self, pools: list[list[Any]]) -> list[dict[str, Any]]:
        return self.lvm.pools([(self._pool(name), float(factor)) for name, factor in pools])

    def create(self, pool: str, name: str, size: int, owner: Owners, overcommit: float) -> int:
        where = self._pool(pool), _name(name)
        made = self.lvm.create(*where, int(size), _owner(owner), float(overcommit))
        self.ours.add(f"{pool}/{name}")
        return made

    def resize(self, pool: str, name: str, size: int, owner: Owners, overcommit: float) -> int:
        where = self._pool(pool), _name(name)
        return self.lvm.resize(*where, int(size), _owner(owner), float(overcommit))

    def destroy(self, pool: str, name: str, owner: Owners) -> None:
        where = self._pool(pool), _name(name)
        if self.lio.backstore(name) is not None:
            raise Refused("in_use", f"volume {name} is exported")
        self.lvm.destroy(*where, _owner(owner))
        self.ours.discard(f"{pool}/{name}")

    def export(self, pool: str, name: str, owner: Owners, **access: Any) -> Any:  # noqa: ANN401
        self._must_be_ours(pool, name, owner)
        portals = [(str(host), int(port)) for host, port in access.pop("portals")]
        return self.lio.export(pool, name, portals=portals, **access)

    def unexport(self, pool: str, name: str, owner: Owners, iqn: str) -> None:
        where = self._pool(pool), _name(name)
        if f"{pool}/{name}" not in self.ours:
            # Gone is well; another's, or not to be told while its volume group is away, is not.
            self.lvm.owned(*where, _owner(owner))
        self.lio.unexport(*where, iqn)

    def set_auth(self, pool: str, name: str, owner: Owners, chap: Any) -> list[str]:  # noqa: ANN401
        self._must_be_ours(pool, name, owner)
        return self.lio.set_auth(name, chap)

    def _must_be_ours(self, pool: str, name: str, owner: Owners) -> None:
        if f"{pool}/{name}" in self.ours:
            return
        if self.lvm.owned(self._pool(pool), _name(name), _owner(owner)) is None:
            raise Refused("not_found", f"logical volume {pool}/{name} does not exist")
        self.ours.add(f"{pool}/{name}")

    def _pool(self, name: str) -> str:
        if not POOL.fullmatch(name):
            raise Refused("invalid", f"{name!r} is not a pool")
        if self.allowed and name not in self.allowed:
            allowed = ", ".join(sorted(self.allowed))
            raise Refused("invalid", f"pool {name} is not one of those allowed here: {allowed}")
        return name

    # -- working them

    def batch(self, requests: list[Request]) -> list[Answer]:
        """Work them in turn, save the configuration once, and only then answer."""
        now = time.monotonic()
        late = [request for request in requests if _until(request) <= now]
        requests = [request for request in requests if _until(request) > now]
        answers = [_error(request, "busy", _NO_TIME) for request in late]
        return answers + self._together(requests) if requests else answers

    def _together(self, requests: list[Request]) -> list[Answer]:
        self.until = min(_until(request) for request in requests)
        try:
            with _locked(OWN_LOCK, self.left), _locked(TARGETCLI_LOCK, self.left):
                self.lio.forget_cached()
                answers = [self._work(request) for request in requests]
                failure = self._save()
        except Refused as error:
            return [_error(request, error.kind, str(error)) for request in requests]
        if failure is None:
            return answers
        return [_error(a, "failed", failure) if "result" in a else a for a in answers]

    def _work(self, request: Request) -> Answer:
        self.until = _until(request)
        args, op = request.get("args") or {}, str(request.get("op"))
        operation = self.ops.get(op)
        if operation is None:
            return _error(request, "invalid", f"unknown request {op!r}")
        needed = min(CHANGE_S, _limit(request) / 2) if op in CHANGING else 0.0
        if self.left() <= needed:
            return _error(request, "busy", _NO_TIME)
        try:
            return {"id": request.get("id"), "result": operation(**args)}
        except Refused as error:
            return _error(request, error.kind, _without_secrets(str(error), args))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            return _error(request, "failed", _without_secrets(text, args))

    def _save(self) -> str | None:
        try:
            self.lio.save()
        except Exception as error:
            return f"the host's configuration cannot be saved: {error}"
        return None


def _limit(request: Request) -> float:
    return float(request.get("limit_s", 60))


def _until(request: Request) -> float:
    """It was sent when it came, however long it has waited here: nobody waits for it any longer."""
    return float(request["came"]) + _limit(request)


def _error(request: Request, kind: str, text: str) -> Answer:
    return {"id": request.get("id"), "error": {"kind": kind, "text": text}}


def _without_secrets(text: str, args: Request) -> str:
    chap = args.get("chap")
    for key in ("password", "mutual_password"):
        if isinstance(chap, dict) and chap.get(key):
            text = text.replace(str(chap[key]), "***")
    return text


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise Refused("invalid", f"{text!r} is not the name of a volume")
    return text


def _owner(texts: Owners) -> Owners:
    for text in texts:
        if not OWNER.fullmatch(text):
            raise Refused("invalid", f"{text!r} cannot be a tag of LVM")
    return texts


@contextlib.contextmanager
def _locked(path: str, left: Callable[[], float]) -> Iterator[None]:
    """Hold a lock file; ``Refused`` if another holds it for as long as we may wait."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left():
                    text = f"{path} is locked by another: is a targetcli shell open on the host?"
                    raise Refused("busy", text) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


class Inbox:
    """What has come and is not begun, read by a thread; nothing once its sender is gone."""

    def __init__(self, source: BinaryIO) -> None:
        self.waiting: list[Request] = []
        self.ended = False
        self.changed = threading.Condition()
        self.source = source
        threading.Thread(target=self.read, name="inbox", daemon=True).start()

    def read(self) -> None:
        rest = b""
        try:
            # Not through the file object: Python aborts when it ends with a thread inside of one.
            while data := os.read(self.source.fileno(), 1 << 16):
                *lines, rest = (rest + data).split(b"\n")
                came = time.monotonic()
                requests = [{**json.loads(line), "came": came} for line in lines]
                with self.changed:
                    self.waiting += requests
                    self.changed.notify()
        finally:
            with self.changed:
                self.ended = True
                self.waiting.clear()
                self.changed.notify()

    def take(self) -> list[Request]:
        """The next ones; none: it is over."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.ended)
            taken, self.waiting[:] = self.waiting[:BATCH], self.waiting[BATCH:]
            return taken


def serve(source: BinaryIO, tell: Callable[[Answer], None], server: Server) -> None:
    """Work what comes until the end; requests that have come meanwhile are worked together."""
    inbox = Inbox(source)
    while requests := inbox.take():
        for answer in server.batch(requests):
            tell(answer)


def main() -> None:
    """Say who we are, then serve."""
    # The answers' own: what a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(answer: Answer) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    parser = argparse.ArgumentParser(description="storage host's side of iscsi-targetd-provisioner")
    parser.add_argument("--pool", action="append", default=[], help="may be used; default: all")
    pools = parser.parse_args().pool
    try:
        server = Server(Lio(), pools)
    except ImportError as error:
        tell({"fatal": f"{error}: install python3-rtslib-fb (Debian) or python3-rtslib (Fedora)"})
        sys.exit(1)
    except Exception as error:
        tell({"fatal": f"LIO cannot be used by uid {os.geteuid()}: {error}"})
        sys.exit(1)
    tell({"hello": {"protocol": PROTOCOL, "python": platform.python_version()}})
    serve(sys.stdin.buffer, tell, server)
