"""One volume from dirty to clean, with progress that survives a kill.

What is on record is always behind what is on the disk: a step is recorded once it has been synced,
so after a kill some bytes are wiped twice and none is left out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from external_storage import get_logger
from external_storage.worker import WorkerError, WorkerProcess
from local_volume_provisioner import records
from local_volume_provisioner.cleaning import blocks, commands, directories, guard
from local_volume_provisioner.cleaning.commands import CommandFailed
from local_volume_provisioner.cleaning.directories import MountTask
from local_volume_provisioner.cleaning.guard import DeviceTask, Refused
from local_volume_provisioner.config import ClassConfig
from local_volume_provisioner.ledger import Ledger, Record, Use
from local_volume_provisioner.methods import MKFS, Method, MethodKind
from local_volume_provisioner.records import Release
from local_volume_provisioner.scan import Candidate, Kind

log = get_logger(__name__)

_DIRECTORY_S = 5.0
_CALL_S = 30.0
"""For opening and looking."""
_SHORT_S, _GROWTH = 1.0, 4
"""Steps that take less than so many seconds become so many times as long."""
_ASK_EVERY_S = 5.0
"""Whether a command that runs is still wanted."""


class Stopped(Exception):
    """The agent is stopping, or nobody wants it any more: it goes on another time."""


class CleaningFailed(Exception):
    """Why; what had been done is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long one call may take, in seconds."""

    step_s: float
    command_s: float


@dataclass(slots=True)
class Progress:
    """How far the wipe of one path has come."""

    done: int = 0
    """Bytes, over all passes."""
    total: int = 0
    """0: nobody can tell, as with a command or a directory."""
    since: float = 0.0
    """When this run began; on a monotonic clock."""

    @property
    def ratio(self) -> float:
        return self.done / self.total if self.total else 0.0


class Cleaner:
    """Cleans volumes, each in a process of its own; safe to use from threads."""

    def __init__(self, ledger: Ledger, limits: Limits, run_directory: str) -> None:
        self._ledger = ledger
        self._limits = limits
        self._run_directory = run_directory
        self._lock = threading.Lock()
        self._workers: dict[str, WorkerProcess] = {}
        self._stopping = False
        self.progress: dict[str, Progress] = {}
        """By path, of what is being cleaned now."""

    def stop(self) -> None:
        """End all processes at once; what they have not recorded is done again later."""
        with self._lock:
            self._stopping = True
            workers = list(self._workers.values())
        for worker in workers:
            worker.close()

    def clean(
        self,
        candidate: Candidate,
        config: ClassConfig,
        *,
        uid: str,
        claim: str = "",
        cluster: str = "",
        known: Record | None = None,
        wanted: Callable[[], bool],
        tell: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        """Clean it and record that it is clean.

        Args:
            candidate: as it was found just now; its identity has been compared.
            config: with which method.
            uid: of the volume, empty when it has none any more.
            claim: the UID of the claim that has let go of it; empty without a volume.
            cluster: where that is.
            known: what was on record when it was decided, None for nothing; if that has changed
                since, whoever has changed it goes first.
            wanted: asked between steps: nobody uses it, nobody has called it off.
            tell: told after each step.

        Raises:
            CleaningFailed, Stopped, Refused.
        """
        known = known if known is not None else self._ledger.get(candidate.path)
        record = records.begun(known, candidate, config, Release(uid, claim, cluster))
        worker = WorkerProcess(f"clean {candidate.path}")
        progress = Progress(since=time.monotonic())
        with self._lock:
            if self._stopping:
                raise Stopped
            self._workers[candidate.path] = worker
            self.progress[candidate.path] = progress
        try:
            job = _Job(self, worker, candidate, config, record, progress, wanted, tell)
            job.prepare()
            # Only now: what has been refused is as it was, and the brake may still hold it.
            self._swap(known, record)
            job.run()
            done = msgspec.structs.replace(
                job.record, use=Use.CLEAN, passes_done=0, bytes_done=0, method=""
            )
            self._swap(job.record, done)
        except (WorkerError, CommandFailed, OSError) as error:
            if isinstance(error, WorkerError) and (self._stopping or job.is_called_off):
                raise Stopped from error
            raise CleaningFailed(_reason(error)) from error
        finally:
            with self._lock:
                del self._workers[candidate.path], self.progress[candidate.path]
            worker.close()

    def is_cleaning(self, path: str) -> bool:
        with self._lock:
            return path in self._workers

    def is_on_record(self, record: Record) -> bool:
        """Whether nobody has written anything else meanwhile: that it has a user, for one."""
        return self._ledger.get(record.path) == record

    def checkpoint(self, old: Record, record: Record) -> None:
        """Raises Stopped when there is something else on record than ``old``."""
        self._swap(old, record)

    def _swap(self, old: Record | None, record: Record) -> None:
        if not self._ledger.swap(old, record, record.path):
            raise Stopped

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def run_directory(self) -> str:
        return self._run_directory

    def is_stopping(self) -> bool:
        return self._stopping


@dataclass(slots=True)
class _Job:
    """One run of one wipe."""

    cleaner: Cleaner
    worker: WorkerProcess
    candidate: Candidate
    config: ClassConfig
    record: Record
    progress: Progress
    wanted: Callable[[], bool]
    tell: Callable[[Progress], None]
    size: int = 0
    """Of a device, in bytes."""
    is_called_off: bool = False

    def prepare(self) -> None:
        """All that may be refused, before anything is changed or written down."""
        if self.candidate.kind is Kind.MOUNT:
            self.worker.call(directories.probe, self._mount(), timeout_s=_CALL_S)
        elif self.config.method.in_place:
            method = self.config.method
            self.size = self.worker.call(blocks.begin, self._task(), method, timeout_s=_CALL_S)
        else:
            self.worker.call(guard.probe, self._task(), timeout_s=_CALL_S)

    def run(self) -> None:
        if self.candidate.kind is Kind.MOUNT:
            self._directory()
        elif self.config.method.in_place:
            self._blocks(self.config.method)
        else:
            self._command(self.config.method)

    def _task(self) -> DeviceTask:
        found = self.candidate
        return DeviceTask(found.mount_path, found.number, found.identity)

    def _mount(self) -> MountTask:
        found = self.candidate
        return MountTask(found.mount_path, found.number, found.identity)

    def _is_wanted(self) -> bool:
        return self.cleaner.is_on_record(self.record) and self.wanted()

    def _check(self) -> None:
        if self.cleaner.is_stopping() or not self._is_wanted():
            raise Stopped

    def _directory(self) -> None:
        limit = _DIRECTORY_S + self.cleaner.limits.step_s
        while True:
            self._check()
            if self.worker.call(directories.clean, self._mount(), _DIRECTORY_S, timeout_s=limit):
                return
            self.tell(self.progress)

    def _blocks(self, method: Method) -> None:
        if method.kind is not MethodKind.SIGNATURES:
            self.progress.total = self.size * method.passes
            for number in range(self.record.passes_done, method.passes):
                self._pass(method, self.size, is_last=number == method.passes - 1)
        self._check()
        self.worker.call(blocks.finish, timeout_s=self.cleaner.limits.step_s)

    def _pass(self, method: Method, size: int, *, is_last: bool) -> None:
        step, random = blocks.STEP[method.kind], method.kind is MethodKind.OVERWRITE and not is_last
        while (offset := self.record.bytes_done) < size:
            self._check()
            length = min(step, size - offset)
            began = time.monotonic()
            self.worker.call(
                blocks.step, offset, length, random, timeout_s=self.cleaner.limits.step_s
            )
            if time.monotonic() - began < _SHORT_S:
                # A fast disk is not to spend its time on being written down.
                step *= _GROWTH
            if offset + length >= size:
                break
            self._advance(passes=self.record.passes_done, offset=offset + length, size=size)
        self._advance(passes=self.record.passes_done + 1, offset=0, size=size)

    def _advance(self, *, passes: int, offset: int, size: int) -> None:
        old = self.record
        self.record = msgspec.structs.replace(old, passes_done=passes, bytes_done=offset)
        self.cleaner.checkpoint(old, self.record)
        self.progress.done = passes * size + offset
        self.tell(self.progress)

    def _command(self, method: Method) -> None:
        self._check()
        limit, directory = self.cleaner.limits.command_s, self.cleaner.run_directory
        with self._ended_when_unwanted():
            if method.kind is MethodKind.REFORMAT:
                mkfs = MKFS[self.config.fs_type or "ext4"]
                said = self.worker.call(
                    commands.reformat, self._task(), mkfs, directory, timeout_s=limit
                )
            else:
                said = self.worker.call(
                    commands.run, self._task(), method.command, directory, timeout_s=limit
                )
        for line in said.splitlines():
            log.info("the cleaning command said", path=self.candidate.path, line=line)

    @contextmanager
    def _ended_when_unwanted(self) -> Iterator[None]:
        """A command has no steps, and may take days: it is killed once it is called off."""
        ended = threading.Event()

        def ask() -> None:
            while not ended.wait(_ASK_EVERY_S):
                if not self._is_wanted():
                    self.is_called_off = True
                    self.worker.close()
                    return

        asking = threading.Thread(target=ask, name="still wanted", daemon=True)
        asking.start()
        try:
            yield
        finally:
            ended.set()
            asking.join()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return str(error)


__all__ = ["Cleaner", "CleaningFailed", "Limits", "Progress", "Refused", "Stopped"]
