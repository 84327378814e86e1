"""One mounted share: calls on it, and whether any can be made at this moment."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar, TypeVarTuple, Unpack

from external_storage import deadline
from external_storage.errors import Unchanged
from external_storage.logs import get_logger
from external_storage.shares.layout import Facts, Site, prepare
from external_storage.shares.location import Expected, WrongMount, join, server_path
from external_storage.worker import (
    NoTurn,
    WorkerDied,
    WorkerError,
    WorkerProcess,
    WorkerTimeout,
)

log = get_logger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_PROBE_INTERVAL_S = 30.0
_BACKOFF_START_S = 1.0
_BACKOFF_MAX_S = 60.0
_JOIN_S = 5.0
_LEAST_S = 5.0
"""Of our caller's time, or half of a call's limit: with less left no call is begun, for it would be
killed for our caller's haste and the share taken for hung."""
# Of the whole mount, or of one file or directory only.
_MOUNT_ERRORS = frozenset({errno.EROFS, errno.ESTALE, errno.ETIMEDOUT})


class ShareUnavailable(Unchanged):
    """Nothing can be done on a share now: not mounted, another one, read-only, or it hangs.

    The text says which and is shown to users. A call that was cut off may have had an effect.
    """


class Share:
    """A path of a file server, mounted into our pod; safe to use from threads.

    A thread looks at it now and then, and with a back-off while it is unavailable: it comes back by
    itself. Until it was found in order for the first time it is unavailable.
    """

    def __init__(
        self,
        name: str,
        *,
        server: str,
        path: str,
        mount_point: Path,
        expected: Expected | None = None,
        call_limit_s: float = 30.0,
    ) -> None:
        """Starts nothing and touches nothing.

        Args:
            name: for people, and unique among the shares of a program.
            server: its address, as volumes shall have it.
            path: the server's directory the volumes are below.
            mount_point: where that directory is in our file system; below the mount if the pod
                mounts a directory above it.
            expected: what must be mounted there; an NFS mount of ``server:path`` by default.
            call_limit_s: seconds after which a call is killed, if its own deadline is later.

        Raises ValueError for a path that is not absolute.
        """
        self.name = name
        self.server = server
        self.path = server_path(path)
        self.mount_point = mount_point
        self.expected = expected or Expected.nfs(server, path)
        self.call_limit_s = call_limit_s
        self._kills = 0
        self._facts: Facts | None = None
        self._workers: list[WorkerProcess] = []
        self._worker = self.background("calls")
        self._lock = threading.Lock()
        self._trouble: str | None = "it has not been looked at yet"
        self._troubles = 0
        self._preparations: list[Callable[[], None]] = []
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._settled = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"share-{name}", daemon=True)

    def __str__(self) -> str:
        return f"share {self.name!r} ({self.server}:{self.path})"

    # -- life

    def start(self) -> None:
        """Begin to look at it; does not wait."""
        self._thread.start()

    def stop(self) -> None:
        """Kill what is going on; nothing can be called any more."""
        self._stopping.set()
        self._wanted.set()
        for worker in self._workers:
            worker.close()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_S)

    def before_use(self, preparation: Callable[[], None]) -> None:
        """Have something done, in our thread, each time before the share becomes available.

        Its calls are made; when it raises ShareUnavailable the share stays as it is. Before
        ``start`` only.
        """
        self._preparations.append(preparation)

    def wait_looked_at(self, timeout_s: float) -> bool:
        """Wait until the first look has ended, well or not; False if it has not by then."""
        return self._settled.wait(timeout_s)

    # -- what it is like

    def problem(self) -> str | None:
        """Why it cannot be used now, in words for people; None if it can."""
        trouble = self._trouble
        return None if trouble is None else f"{self} is not available: {trouble}"

    @property
    def facts(self) -> Facts | None:
        """What the last look that succeeded has found; None before the first."""
        return self._facts

    @property
    def server_maps_root(self) -> bool:
        """Whether the server lets us work as another user than we are (root_squash, all_squash)."""
        return self._facts is not None and self._facts.our_uid != os.geteuid()

    @property
    def kills(self) -> int:
        """How many processes were killed at their deadline so far."""
        return self._kills

    @property
    def stuck(self) -> int:
        """How many killed processes hang in the kernel and are still there."""
        return sum(worker.stuck for worker in self._workers)

    def server_path(self, relative: str) -> str:
        """The server's path of what is at ``relative``."""
        return join(self.path, relative)

    def look_anew(self, why: str, *, timeout_s: float) -> None:
        """Take it for unavailable until it has been looked at and prepared again; waits for that.

        ``why`` is for people. What is unavailable already stays so for its own reason.
        """
        with self._lock:
            self._troubles += 1
            if self._trouble is None:
                self._trouble = why
        self._settled.clear()
        self._wanted.set()
        if timeout_s > 0:
            self._settled.wait(timeout_s)

    # -- calls

    def call(self, function: Callable[[Site, Unpack[Ts]], T], *args: *Ts) -> T:
        """``function(site, *args)`` in the share's process, within the deadline of our caller.

        Args:
            function: a module-level one that begins with ``layout.opened(site)``.
            args: values that can be pickled, as must be the result.

        Raises ShareUnavailable, at once while the share is known to be so, and what the function
        raises.
        """
        return self.call_in(self._worker, self.call_limit_s, function, *args)

    def background(self, purpose: str) -> WorkerProcess:
        """A process of the share's for ``call_in``: it neither waits for others nor keeps them."""
        worker = WorkerProcess(f"{self.name}-{purpose}")
        self._workers.append(worker)
        return worker

    def call_in(
        self,
        worker: WorkerProcess,
        limit_s: float,
        function: Callable[[Site, Unpack[Ts]], T],
        *args: *Ts,
    ) -> T:
        """``call`` in another process of ours, with another limit in seconds."""
        if self._trouble is not None and threading.current_thread() is not self._thread:
            raise ShareUnavailable(self.problem())
        uid = None if self._facts is None else self._facts.our_uid
        site = Site(base=self.mount_point, expected=self.expected, our_uid=uid)
        timeout_s = min(limit_s, deadline.current().remaining())
        if timeout_s < min(_LEAST_S, limit_s / 2):
            raise ShareUnavailable(f"{self}: no time is left for a call")
        try:
            return worker.call(function, site, *args, timeout_s=timeout_s)
        except NoTurn as error:
            raise ShareUnavailable(f"{self} is busy: {error}") from error
        except (WorkerError, WrongMount) as error:
            raise self._lost(error, timeout_s) from error
        except OSError as error:
            if error.errno not in _MOUNT_ERRORS:
                raise
            if function is prepare:
                raise self._lost(error, timeout_s) from error
            # A snapshot directory is read-only, and a file may be stale, on a share that is fine.
            # If this fails, the share is lost.
            self.call_in(worker, limit_s, prepare)
            raise

    # -- inside

    def _lost(self, error: Exception, timeout_s: float) -> ShareUnavailable:
        """Note that it cannot be used, and have it looked at."""
        if isinstance(error, WorkerTimeout):
            trouble = f"the server has not answered for {timeout_s:.0f} s"
        elif isinstance(error, WorkerDied) and self._stopping.is_set():
            trouble = "we are stopping"
        elif isinstance(error, OSError):
            trouble = error.strerror or str(error)
        else:
            trouble = str(error)
        with self._lock:
            self._kills += isinstance(error, WorkerTimeout)
            was, self._trouble = self._trouble, trouble
            self._troubles += 1
        if trouble != was and not self._stopping.is_set():
            log.warning("a share is not available", share=self.name, reason=trouble)
        if threading.current_thread() is not self._thread:
            self._wanted.set()
        return ShareUnavailable(f"{self} is not available: {trouble}")

    def _run(self) -> None:
        pause_s = _BACKOFF_START_S
        while not self._stopping.is_set():
            self._wanted.clear()
            try:
                self._look()
            except ShareUnavailable as error:
                log.debug("a look at a share failed", share=self.name, error=str(error))
            except Exception as error:
                self._lost(error, self.call_limit_s)
                log.exception("a share cannot be made ready", share=self.name)
            self._settled.set()
            if self._trouble is None:
                self._wanted.wait(_PROBE_INTERVAL_S)
                pause_s = _BACKOFF_START_S
            else:
                # Whoever asks for a look meanwhile does not make it more often.
                self._stopping.wait(pause_s)
                pause_s = min(pause_s * 2, _BACKOFF_MAX_S)

    def _look(self) -> None:
        """See whether it can be used; ShareUnavailable if not."""
        with self._lock:
            troubles, was_available = self._troubles, self._trouble is None
        self._facts = self.call_in(self._worker, self.call_limit_s, prepare)
        if not was_available:
            for preparation in self._preparations:
                preparation()
        with self._lock:
            if self._troubles != troubles:
                # Somebody's call has failed meanwhile: that is the news.
                return
            self._trouble = None
        if not was_available:
            log.info("a share is available", share=self.name)


@contextmanager
def looked_at(shares: Iterable[Share], timeout_s: float) -> Iterator[None]:
    """Shares for the time of a command: started, all of them available, and stopped at the end.

    Raises ``ShareUnavailable`` for one that is not, after ``timeout_s`` seconds for each if its
    server does not answer: half of what there is would look like the whole.
    """
    with ExitStack() as started:
        all_shares = list(shares)
        for share in all_shares:
            started.callback(share.stop)
            share.start()
        for share in all_shares:
            share.wait_looked_at(timeout_s)
            if (problem := share.problem()) is not None:
                raise ShareUnavailable(problem)
        yield
