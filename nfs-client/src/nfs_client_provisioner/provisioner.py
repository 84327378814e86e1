"""Volumes as directories on NFS servers that somebody else runs.

The servers are mounted in our pod by the kubelet; what is done on one runs in a process of its own,
so that a server that hangs holds up its own claims only. What a volume's end needs stands on the
volume since it was made (``stored``), and is checked against its record on the share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from external_storage import (
    AssetRecord,
    Context,
    Expanded,
    Infeasible,
    PersistentVolume,
    PersistentVolumeClaim,
    ProvisionedVolume,
    Provisioner,
    ProvisioningFailed,
    ProvisionRequest,
    get_logger,
)
from external_storage.kube.types import ObjectMeta
from external_storage.shares import (
    Ended,
    JoinedRecords,
    Made,
    Ownership,
    PathTaken,
    ShareUnavailable,
    check_path,
    export_metrics,
)
from nfs_client_provisioner import ownership
from nfs_client_provisioner.groups import GID, Groups, begun_gid
from nfs_client_provisioner.ledger import Entry, Ledger, Place
from nfs_client_provisioner.overcommit import Overcommit
from nfs_client_provisioner.ownership import Wanted
from nfs_client_provisioner.parameters import NfsClientParameters, OnDelete
from nfs_client_provisioner.predecessor import policy_of_class
from nfs_client_provisioner.settings import NfsClientSettings
from nfs_client_provisioner.shares import Mounted, Servers
from nfs_client_provisioner.stored import BadStored, Stored
from nfs_client_provisioner.usage import UsageCounter

log = get_logger(__name__)

_FIRST_LOOK_S = 5.0
_SECOND_ROUND_S = 1.0

_WAY_OUT = (
    ', whose PersistentVolume is gone: a class with adopt: "true" takes it over, the command '
    '"orphans --forget" gives it free'
)

Request = ProvisionRequest[NfsClientParameters]


class NfsClientProvisioner(Provisioner[NfsClientSettings, NfsClientParameters]):
    """Makes volumes as directories on existing NFS servers."""

    def __init__(self, settings: NfsClientSettings, context: Context) -> None:
        super().__init__(settings, context)
        self._servers = Servers(
            [
                Mounted.of(server, owner=context.owner, call_limit_s=settings.call_timeout)
                for server in settings.read_servers()
            ]
        )
        self._ledger = Ledger(self._place_of)
        self._groups = Groups()
        self._overcommit = Overcommit(self._ledger, context.events)
        self._usage = UsageCounter(self._servers, interval_s=settings.usage_interval)
        self._told_size: set[tuple[str, str]] = set()
        # What a crash has left is removed by the second round that finds it.
        self.reconcile_interval_s = _SECOND_ROUND_S

    # -- life

    def start(self) -> None:
        shares = [one.directories for one in self._servers.all()]
        self.records = JoinedRecords([directories.records for directories in shares])
        self.context.watch_volumes(self._ledger.observe)
        self.context.watch_volumes(self._groups.observe)
        export_metrics(self.context.metrics, shares)
        self._usage.export(self.context.metrics)
        for directories in shares:
            directories.start()
        for directories in shares:
            # Else the first claims would be told to wait for shares that are fine.
            directories.share.wait_looked_at(_FIRST_LOOK_S)
        self._usage.start()

    def stop(self) -> None:
        self._usage.stop()
        for one in self._servers.all():
            one.directories.stop()

    def check(self) -> str | None:
        """Nothing can be done at all only when no share is available."""
        problems = [one.directories.problem() for one in self._servers.all()]
        if None in problems:
            return None
        return "; ".join(problem for problem in problems if problem)

    def trouble(self) -> str | None:
        found = [
            problem
            for one in self._servers.all()
            for problem in (one.directories.problem(), one.directories.trash_problem())
            if problem
        ]
        return "; ".join(found) or None

    def reconcile(self, volumes: Sequence[PersistentVolume]) -> None:
        self.reconcile_interval_s = Provisioner.reconcile_interval_s
        for one in self._servers.all():
            one.directories.tidy()
        self._usage.soon(volumes)

    # -- work

    def provision(self, request: Request) -> ProvisionedVolume:
        parameters = request.parameters
        mounted = self._servers.pick(parameters.server)
        path, wanted = _expand(request)
        if problem := mounted.directories.problem():
            raise ShareUnavailable(problem)
        entry = Entry(place=Place(server=mounted.server.name, path=path), capacity=request.capacity)
        try:
            with self._ledger.reserve(request.volume_name, entry, shared=parameters.shared):
                # Counted before it is asked: two claims at once must not both be the last to fit.
                self._overcommit.admit(
                    mounted, request.volume_name, capacity=request.capacity, claim=request.claim
                )
                made, gid = self._make(mounted, request, path=path, wanted=wanted)
        except PathTaken as error:
            if mounted.directories.records.gone(path, self._is_gone):
                raise ProvisioningFailed(f"{error}{_WAY_OUT}") from error
            raise
        except OSError as error:
            raise ProvisioningFailed(f"{mounted.directories.share}: {_reason(error)}") from error
        self._tell_about_size(request)
        stored = Stored(
            base=mounted.server.path,
            path=made.path,
            on_delete=parameters.policy,
            archive_retention_s=parameters.archive_retention,
        )
        return ProvisionedVolume(
            source={"nfs": {"server": mounted.server.server, "path": made.server_path}},
            mount_options=mounted.server.mount_options,
            gid=gid,
            annotations=stored.annotations(),
        )

    def delete(self, volume: PersistentVolume) -> None:
        try:
            stored = Stored.from_volume(volume)
        except BadStored as error:
            raise ProvisioningFailed(f"{error}: nothing is removed") from error
        mounted, place = self._servers.find_stored(volume, stored)
        if stored is None:
            stored = self._stored_by_predecessor(volume, mounted, place)
        try:
            ended = self._end(volume.name, mounted, place, stored=stored)
        except OSError as error:
            raise ProvisioningFailed(f"{mounted.directories.share}: {_reason(error)}") from error
        self._ledger.ended(volume.name)
        self._groups.release(volume.name)
        log.info(
            "directory ended",
            volume=volume.name,
            path=place.path,
            how=ended.ending.value,
            place=ended.place,
        )

    def expand(self, volume: PersistentVolume, capacity: int) -> Expanded:
        """Only a number: an NFS client cannot limit a directory."""
        claim = _claim_of(volume)
        found = self._servers.find(volume)
        if found is not None:
            self._overcommit.admit(found[0], volume.name, capacity=capacity, claim=claim)
        text = "The new size is noted; an NFS directory has no limit but its file system's"
        self.context.events.normal(claim, "SizeNotEnforced", text)
        return Expanded(capacity)

    def discard(self, record: AssetRecord) -> None:
        for one in self._servers.all():
            if record.name in one.directories.records:
                one.directories.discard(record)
        self._ledger.ended(record.name)
        self._groups.release(record.name)

    # -- a new directory

    def _make(
        self, mounted: Mounted, request: Request, *, path: str, wanted: Wanted
    ) -> tuple[Made, int | None]:
        """The directory, and the group that pods get."""
        records = mounted.directories.records
        if request.parameters.adopt:
            for name in records.gone(path, self._is_gone):
                log.info("a directory is taken over from a volume that is gone", volume=name)
                mounted.directories.keep(name)
        with self._group(mounted, request, path=path, wanted=wanted) as gid:
            made = mounted.directories.make(
                request.volume_name,
                claim=request.claim,
                path=path,
                ownership=Ownership(
                    uid=-1 if wanted.uid is None else wanted.uid,
                    gid=-1 if gid is None else gid,
                    mode=wanted.mode,
                ),
                adopt=request.parameters.adopt,
                shared=request.parameters.shared,
                details={} if gid is None else {GID: gid},
            )
        # Another claim may have been first to make the directory that they share.
        has = begun_gid(made.details)
        if made.adopted:
            # Its group is not ours to choose: pods get the one that it has, unless that is root's.
            has = mounted.group_of(made.path) or None
        if has != gid:
            self._groups.release(request.volume_name)
        return made, has

    @contextmanager
    def _group(
        self, mounted: Mounted, request: Request, *, path: str, wanted: Wanted
    ) -> Iterator[int | None]:
        """The group of a new directory; None: none of its own."""
        records = mounted.directories.records
        if not wanted.is_auto:
            yield wanted.gid
            return
        for holder in records.holders(path):
            record = records.get(holder)
            gid = begun_gid(record.details) if record is not None else None
            if gid is not None and holder != request.volume_name:
                yield gid  # the directory is there, with this group, and is shared
                return
        begun = (
            record for share in self._servers.all() for record in share.directories.records.begun()
        )
        with self._groups.reserve(
            request.volume_name,
            begun=begun,
            minimum=request.parameters.gid_min,
            maximum=request.parameters.gid_max,
        ) as gid:
            yield gid

    def _tell_about_size(self, request: Request) -> None:
        """Once for each class in a namespace: it is news only the first time."""
        key = (request.claim.namespace, request.storage_class.name)
        if key not in self._told_size:
            self._told_size.add(key)
            text = "The size is not enforced: an NFS directory can grow as its file system can"
            self.context.events.normal(request.claim, "SizeNotEnforced", text)

    # -- the end of a directory

    def _end(self, name: str, mounted: Mounted, place: Place, *, stored: Stored) -> Ended:
        directories = mounted.directories
        if stored.on_delete is OnDelete.RETAIN:
            return directories.keep(name)
        self._ledger.refuse_around(place)
        with self._alone_with(name, mounted, place):
            company = self._ledger.company(name, place)
            is_recorded = directories.records.get(name) is not None
            if company - set(directories.records.holders(place.path) if is_recorded else ()):
                # Volumes of nfs-subdir have no records: the share cannot count them, but we can.
                return directories.keep(name, in_use=True)
            if stored.on_delete is OnDelete.ARCHIVE:
                keep_s = stored.archive_retention_s or self.settings.archive_retention
                return directories.archive(name, path=place.path, keep_s=keep_s)
            return directories.remove(name, path=place.path)

    @contextmanager
    def _alone_with(self, name: str, mounted: Mounted, place: Place) -> Iterator[None]:
        """One at a time where volumes have the same directory: the last one takes it along."""
        if not self._ledger.company(name, place):
            yield
            return
        with mounted.company:
            yield
            self._ledger.ended(name)

    def _stored_by_predecessor(
        self, volume: PersistentVolume, mounted: Mounted, place: Place
    ) -> Stored:
        """What nfs-subdir would have read from the class at this moment; archived if it is gone."""
        policy = policy_of_class(self.context.client, volume.spec.storage_class_name)
        if policy is None:
            text = (
                f"The volume does not say what becomes of {place.path!r} and its class "
                f"{volume.spec.storage_class_name!r} does not either: it is archived"
            )
            self.context.events.normal(volume, "ArchivedByDefault", text)
        return Stored(
            base=mounted.server.path, path=place.path, on_delete=policy or OnDelete.ARCHIVE
        )

    # -- inside

    def _is_gone(self, volume_name: str) -> bool:
        """By a live answer: the watch may not have come to it yet."""
        return self.context.client.find(PersistentVolume, volume_name) is None

    def _place_of(self, volume: PersistentVolume) -> Place | None:
        found = self._servers.find(volume)
        return found[1] if found is not None else None


def _expand(request: Request) -> tuple[str, Wanted]:
    """What the patterns of the class give for a claim; ``Infeasible``."""
    parameters = request.parameters
    try:
        path = parameters.template().path(request.claim, volume_name=request.volume_name)
        check_path(path)
    except ValueError as error:
        raise Infeasible(f"parameter 'pathPattern': {error}") from error
    try:
        wanted = ownership.wanted(
            request.claim,
            volume_name=request.volume_name,
            gid=parameters.gid,
            uid=parameters.uid,
            mode=parameters.mode,
        )
    except ValueError as error:
        raise Infeasible(str(error)) from error
    return path, wanted


def _claim_of(volume: PersistentVolume) -> PersistentVolumeClaim:
    """The claim of a volume, as far as an event about it needs it."""
    reference = volume.spec.claim_ref
    if reference is None:
        return PersistentVolumeClaim()
    return PersistentVolumeClaim(
        metadata=ObjectMeta(name=reference.name, namespace=reference.namespace, uid=reference.uid)
    )


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
