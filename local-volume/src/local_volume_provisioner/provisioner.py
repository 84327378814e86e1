"""The agent: informers, the watcher, one loop of passes, and threads that clean."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from external_storage import (
    Agent,
    AgentContext,
    Backoff,
    CannotStart,
    Change,
    Informer,
    PersistentVolume,
    StorageClass,
    Workers,
    WorkQueue,
    get_logger,
)
from external_storage.health import Health
from external_storage.kube.errors import KubeError
from external_storage.worker import WorkerError, WorkerProcess
from local_volume_provisioner import names, node
from local_volume_provisioner.board import Board
from local_volume_provisioner.brake import Brake
from local_volume_provisioner.cleaning.machine import Cleaner, Limits, Progress
from local_volume_provisioner.decide import Action, Decision
from local_volume_provisioner.ledger import Ledger
from local_volume_provisioner.local_metrics import LocalMetrics, Sources
from local_volume_provisioner.mounts import MountTable
from local_volume_provisioner.node import NodeFacts
from local_volume_provisioner.offers import Offers
from local_volume_provisioner.reconcile import Parts, Reconciler, paths_with
from local_volume_provisioner.reload import Configuration
from local_volume_provisioner.requests import Requests
from local_volume_provisioner.scan import Inventory, Scanner, measure
from local_volume_provisioner.settings import LocalVolumeSettings
from local_volume_provisioner.states import State
from local_volume_provisioner.views import Failures, Views
from local_volume_provisioner.volumes import VolumeApi
from local_volume_provisioner.watcher import Watcher, is_on_one_path, link_targets
from local_volume_provisioner.whereabouts import Whereabouts
from local_volume_provisioner.work import CleaningWork

log = get_logger(__name__)

_RETRY_S = 5.0
_SETTLE_S = 0.05
"""After a change, for those that come with it."""
_MOST_SETTLE_S = 0.2
_REMOTE_S = 10.0
_MOST_PASS_S = 900.0
"""Longer than a thousand volumes take on a slow API server: what takes longer hangs in a disk."""
_BACKOFF = Backoff(start_s=5.0, max_s=600.0, jitter=0.1)


class LocalVolumeProvisioner(Agent[LocalVolumeSettings]):
    """Disks and mounts of one node as volumes."""

    def __init__(self, settings: LocalVolumeSettings, context: AgentContext) -> None:
        super().__init__(settings, context)
        label = f"{names.LABEL_NODE}={names.node_label(settings.node_name)}"
        self._volumes = Informer(context.client, PersistentVolume, label_selector=label)
        self._classes = Informer(context.client, StorageClass)
        self._configuration = Configuration(settings.config_dir)
        self._requests = Requests(settings.state_dir)
        self._brake = Brake(settings.brake_volumes, settings.brake_pause)
        self._failures = Failures()
        self._queue: WorkQueue[str] = WorkQueue("cleaning", backoff=_BACKOFF)
        self._remote = WorkerProcess("look at mounts")
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="passes", daemon=True)
        self._looked = False
        self._trouble = ""
        """Why the last pass failed."""
        self._pass_since = 0.0
        """When the one under way has begun, on a monotonic clock; 0: none is."""
        # Events, because a flag that is read and then cleared can lose one that comes between.
        self._look = threading.Event()
        self._look.set()
        """The directories are to be looked at, whatever the table of mounts says."""
        self._due = threading.Event()
        self._due.set()
        """A pass is to be made; else only mounts have changed, perhaps none of ours."""
        self._inventory: Inventory | None = None
        self._seen_mounts: object = None
        self._node: NodeFacts | None = None
        self._taint_done = False
        self._cleaner: Cleaner | None = None
        self._ledger: Ledger | None = None
        self._watcher: Watcher | None = None
        self._workers: Workers[str] | None = None
        self._board = Board(context.events, lambda path: self._running().get(path))
        self._metrics = LocalMetrics(
            context.metrics,
            Sources(
                volumes=self._volumes.lister.all,
                states=self._board.count,
                progress=self._running,
                config_is_good=lambda: not self._configuration.problems,
                brake_s=self._brake.left_s,
            ),
        )
        context.metrics.watch_queue(self._queue)

    # -- the program around us

    def start(self) -> None:
        settings = self.settings
        self._configuration.load()
        self._ledger = ledger = Ledger(settings.state_dir)
        try:
            self._requests.prepare()
        except OSError as error:
            raise CannotStart(f"--state-dir {settings.state_dir}: {error.strerror}") from error
        limits = Limits(step_s=settings.step_timeout, command_s=settings.command_timeout)
        self._cleaner = Cleaner(ledger, limits, str(settings.run_dir))
        scanner = Scanner(self._measure_remote)
        offers = Offers(ledger, self._classes.lister, self._metrics)
        views = Views(scanner, ledger, self._brake, self._failures, dry_run=settings.dry_run)
        self._reconciler = reconciler = Reconciler(
            Parts(
                scanner=scanner, ledger=ledger, volumes=self._volumes.lister,
                requests=self._requests, board=self._board, views=views, offers=offers,
                whereabouts=Whereabouts(self.context.client, ledger),
                is_being_cleaned=self._cleaner.is_cleaning,
            )
        )  # fmt: skip
        work = CleaningWork(
            client=self.context.client, events=self.context.events, metrics=self._metrics,
            reconciler=self._reconciler, cleaner=self._cleaner, volumes=self._volumes.lister,
            failures=self._failures, requests=self._requests, queue=self._queue,
            wake=self._wake_up,
        )  # fmt: skip
        self._workers = Workers(self._queue, work.do, max_threads=settings.parallel_wipes)
        self._volumes.add_handler(lambda change: self._on_volume(change, offers, reconciler))
        self._classes.add_handler(lambda _: self._wake_up())
        self._watcher = Watcher(on_entries=self._on_entries, on_mounts=self._on_mounts)
        self._watcher.start()
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        self._stopping.set()
        self._wake.set()
        if self._workers is not None:
            self._workers.finish()
        if self._cleaner is not None:
            self._cleaner.stop()
        self._remote.close()
        for informer in (self._volumes, self._classes):
            informer.reflector.stop()
        if self._thread.ident is not None:
            self._thread.join(max(deadline - time.monotonic(), 0.1))
        clean = not self._thread.is_alive()
        if self._workers is not None:
            clean = self._workers.stop(max(deadline - time.monotonic(), 0.1)) and clean
        for informer in (self._volumes, self._classes):
            informer.stop(max(deadline - time.monotonic(), 0.1))
        if self._watcher is not None:
            self._watcher.stop()
        if self._ledger is not None and clean:
            self._ledger.close()
        return clean

    def health(self) -> Health:
        return Health(
            alive={"passes": self._dead},
            ready={
                "first-pass": lambda: None if self._looked else "not yet",
                "passes": lambda: self._trouble or None,
            },
            notes={
                "api": self._disconnected,
                "config": lambda: "; ".join(self._configuration.problems) or None,
                "classes": lambda: "; ".join(self._board.class_problems.values()) or None,
                "brake": lambda: self._board.brake or None,
                "cluster": self._unknown_cluster,
            },
        )

    def pages(self) -> Mapping[str, Callable[[], bytes]]:
        return {"/volumes": self._board.render}

    def _dead(self) -> str | None:
        started = self._thread.ident is not None and not self._stopping.is_set()
        ended = not self._thread.is_alive() or any(
            informer.has_ended for informer in (self._volumes, self._classes)
        )
        if started and ended:
            return "a thread has ended"
        since = self._pass_since
        is_hanging = since and time.monotonic() - since > _MOST_PASS_S
        return f"a pass takes more than {_MOST_PASS_S:g} s" if is_hanging else None

    def _unknown_cluster(self) -> str | None:
        known = self._node is None or self._node.cluster
        return None if known else "no right to read the UID of the namespace kube-system"

    def _tell_trouble(self, trouble: str) -> None:
        if self._node is not None and trouble != self._trouble:
            self.context.events.warning(self._node.node, "PassFailed", trouble)
        self._trouble = trouble

    def _disconnected(self) -> str | None:
        away = [
            i.kind.RESOURCE for i in (self._volumes, self._classes) if not i.reflector.connected
        ]
        return f"not connected: {', '.join(away)}" if away else None

    def _running(self) -> Mapping[str, Progress]:
        return dict(self._cleaner.progress) if self._cleaner is not None else {}

    # -- what wakes us

    def _on_volume(
        self, change: Change[PersistentVolume], offers: Offers, reconciler: Reconciler
    ) -> None:
        volume = change.new or change.old
        assert volume is not None
        offers.seen(volume)
        if change.new is None:
            reconciler.volume_gone(volume)
        if change.new is None or (change.old and change.old.status.phase != volume.status.phase):
            self._failures.forget(volume.spec.local.path if volume.spec.local else "")
        self._wake_up()

    def _wake_up(self) -> None:
        self._due.set()
        self._wake.set()

    def _look_at_all(self) -> None:
        self._look.set()
        self._due.set()

    def _on_entries(self) -> None:
        self._look_at_all()
        self._wake.set()

    def _on_mounts(self) -> None:
        self._wake.set()

    def _measure_remote(self, path: str) -> tuple[int, int, int]:
        try:
            return self._remote.call(measure, path, timeout_s=_REMOTE_S)
        except WorkerError as error:
            raise OSError(f"the file system does not answer: {error}") from error

    # -- the loop

    def _run(self) -> None:
        if not self._prepare():
            return
        assert self._workers is not None
        self._workers.start()
        while not self._stopping.is_set():
            self._wake.clear()
            pause_s = self._configuration.current.resync_s
            started = self._pass_since = time.monotonic()
            try:
                if (self._mounts_changed() or self._due.is_set()) and not self._pass():
                    self._due.set()
                    pause_s = min(pause_s, _RETRY_S)
                self._trouble = ""
            except Exception as error:
                log.exception("a pass failed")
                self._tell_trouble(f"{type(error).__name__}: {error}")
                self._look_at_all()
                pause_s = min(pause_s, _RETRY_S)
            self._pass_since = 0.0
            took_s = time.monotonic() - started
            if brake_s := self._brake.left_s():
                pause_s = min(pause_s, brake_s + 0.1)
            if self._wake.wait(pause_s):
                # Half of the time at most, while a thousand volumes become Available.
                self._stopping.wait(max(_SETTLE_S, min(took_s, _MOST_SETTLE_S)))
            else:
                self._look_at_all()

    def _prepare(self) -> bool:
        """The node and the reference's volumes; however long that takes. False: stopped before."""
        while not self._stopping.is_set():
            try:
                self._node = node.read(self.context.client, self.settings.node_name)
                self._adopt(self._api(self._node))
                break
            except KubeError as error:
                log.warning("the API server cannot be asked yet", error=str(error))
                self._stopping.wait(_RETRY_S)
        # After the adoption: what has our label by then is in the first list.
        self._volumes.start()
        self._classes.start()
        while not (self._volumes.has_synced and self._classes.has_synced):
            if self._stopping.wait(0.02):
                return False
        return not self._stopping.is_set()

    def _adopt(self, api: VolumeApi) -> None:
        """The one time that all volumes of the cluster are listed."""
        for page in self.context.client.pages(PersistentVolume):
            for volume in page.items:
                if api.is_adoptable(volume):
                    api.adopt(volume)
                    log.info("volume adopted", volume=volume.name)

    def _api(self, facts: NodeFacts) -> VolumeApi:
        return VolumeApi(self.context.client, facts, self._configuration.current)

    def _pass(self) -> bool:
        """False if something is to be tried again soon."""
        self._due.clear()
        facts = self._known_node()
        before = self._configuration.current
        if not self._configuration.refresh():
            text = "; ".join(self._configuration.problems)
            self.context.events.warning(facts.node, "ConfigRefused", f"the last one stays: {text}")
        self._board.config_problems = self._configuration.problems
        config = self._configuration.current
        inventory = None if self._must_look(config is not before) else self._inventory
        if not facts.hostname:
            self._board.tell_classes(
                dict.fromkeys(config.classes, "the node has no label kubernetes.io/hostname"),
                facts.node,
            )
            return False
        with self._metrics.passes.time():
            decisions = self._reconciler.run(config, facts, self._api(facts), inventory)
        assert self._reconciler.last is not None
        self._inventory = self._reconciler.last.inventory
        self._board.brake = self._brake.reason()
        self._queue_work(decisions)
        self._looked = True
        is_good = Action.OFFER not in {decision.action for decision in decisions.values()}
        if is_good:
            self._remove_taint(facts)
        return is_good

    def _known_node(self) -> NodeFacts:
        """Read again with each full look: labels change."""
        assert self._node is not None
        if self._look.is_set() and self._looked:
            try:
                self._node = node.read(self.context.client, self.settings.node_name)
            except KubeError as error:
                log.debug("the node cannot be read", error=str(error))
        return self._node

    def _mounts_changed(self) -> bool:
        """Whether something was mounted or unmounted in, at or above our directories; all other
        mounts come and go with pods, and matter only to a disk that waits for being free."""
        directories = self._directories()
        mounts = [
            mount
            for mount in MountTable.read().mounts
            if any(is_on_one_path(mount.mount_point, directory) for directory in directories)
        ]
        changed = mounts != self._seen_mounts or self._board.count()[State.BUSY] > 0
        self._seen_mounts = mounts
        if changed:
            self._look.set()
        return changed

    def _directories(self) -> set[str]:
        return {kind.mount_dir for kind in self._configuration.current.classes.values()}

    def _must_look(self, config_changed: bool) -> bool:
        """Whether the directories are to be looked at; then their watches are made anew too."""
        wanted = self._look.is_set() or config_changed or self._inventory is None
        if wanted:
            self._look.clear()
            assert self._watcher is not None
            directories = self._directories()
            extra = {str(self.settings.config_dir), str(self._requests.directory)}
            self._watcher.watch(directories | extra | link_targets(directories))
        return wanted

    def _queue_work(self, decisions: Mapping[str, Decision]) -> None:
        assert self._reconciler.last is not None
        approved = {path for path, wishes in self._reconciler.last.wishes.items() if wishes}
        for path in paths_with(decisions, (Action.CLEAN, Action.REMOVE)):
            if path in approved and not self._failures.count.get(path):
                self._queue.wake(path)
            else:
                self._queue.add(path)

    def _remove_taint(self, facts: NodeFacts) -> None:
        config = self._configuration.current
        if not config.remove_taint or self._taint_done or self._board.class_problems:
            return
        trouble = node.remove_taint(self.context.client, facts.name, config.taint_key)
        self._taint_done = trouble is None
        if trouble is not None:
            log.warning("the taint cannot be removed", taint=config.taint_key, error=trouble)
            self.context.events.warning(facts.node, "TaintNotRemoved", trouble)
