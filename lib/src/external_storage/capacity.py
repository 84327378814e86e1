"""What is left in the back end, published for the scheduler as CSIStorageCapacity objects.

The scheduler reads them for claims of a class with binding mode WaitForFirstConsumer, if there is
a CSIDriver object with ``storageCapacity: true`` that is named like the class's provisioner. From
then on it chooses no node without an object that has room for the claim: none at all while there
are no objects. No CSIDriver can have a name with a slash: nothing is published for such a name.

Nothing here is needed to provision: whatever fails is told once, tried again, and leaves what was
published before as it is. At exit the objects stay; they are what is known until the next start.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from external_storage.author import Author
from external_storage.errors import ProvisionerError
from external_storage.informer import Change, Lister
from external_storage.kube import quantity
from external_storage.kube.client import Client
from external_storage.kube.errors import (
    AlreadyExists,
    Conflict,
    KubeError,
    NotAllowed,
    NotFound,
    StatusError,
)
from external_storage.kube.names import BINDING_WAIT
from external_storage.kube.types import (
    CSIDriver,
    CSIStorageCapacity,
    Node,
    PersistentVolume,
    StorageClass,
)
from external_storage.logs import get_logger
from external_storage.metrics import Metrics
from external_storage.provisioner import (
    AvailableCapacity,
    Provisioner,
    instance_of,
    overrides,
    works_alone,
)
from external_storage.settings import Settings
from external_storage.workqueue import Backoff

log = get_logger(__name__)

LABEL_PROVISIONER = "external-storage.dev/provisioner"
LABEL_MANAGED_BY = "external-storage.dev/managed-by"
"""``external-storage`` where the leader publishes for all, else with the instance behind it."""

_PREFIX = "external-storage"
_DRIVER_NAME = re.compile(
    r"(?=.{1,63}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
)
_LABEL_VALUE = re.compile(r"(?=.{1,63}$)[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", re.ASCII)
# Work that comes in a burst is one round, and not one for each volume.
_DEBOUNCE_S = 1.0


def can_have_driver(provisioner_name: str) -> bool:
    """Whether a CSIDriver object may have this name."""
    return _DRIVER_NAME.fullmatch(provisioner_name) is not None


def managed_by(instance: str) -> str:
    """The label of the objects of one instance; ``""`` is the one that all replicas share."""
    if not instance:
        return _PREFIX
    label = f"{_PREFIX}-{instance}"
    return label if _LABEL_VALUE.fullmatch(label) else f"{_PREFIX}-{_digest(instance)}"


def capacity_objects(
    storage_class: StorageClass,
    entries: Iterable[AvailableCapacity],
    *,
    instance: str,
    node: Node | None = None,
) -> dict[str, dict[str, Any]]:
    """The objects for one class by name, as camelCase fields.

    The name says what cannot be changed in an object: who reports, the class, the topology. Those
    of a ``node`` are removed with it by the garbage collector.

    Raises:
        ValueError: a number of bytes is negative.
    """
    name = storage_class.provisioner
    labels = {LABEL_PROVISIONER: name, LABEL_MANAGED_BY: managed_by(instance)}
    owners = [] if node is None else [_owner(node)]
    seen: Counter[str] = Counter()
    objects = {}
    for entry in entries:
        topology = json.dumps(dict(entry.topology), sort_keys=True)
        digest = _digest(name, instance, storage_class.name, topology, str(seen[topology]))
        # The same nodes may reach several pools: for the scheduler room in one of them is enough.
        seen[topology] += 1
        largest = entry.maximum_volume_size
        if largest is not None:
            # The scheduler looks at nothing else where there is a maximum.
            largest = min(largest, entry.capacity)
        objects[f"{_PREFIX}-{digest}"] = {
            "metadata": {
                "name": f"{_PREFIX}-{digest}",
                "labels": labels,
                "ownerReferences": owners,
            },
            "storageClassName": storage_class.name,
            "nodeTopology": {"matchLabels": dict(entry.topology)},
            "capacity": quantity.from_bytes(entry.capacity),
            "maximumVolumeSize": None if largest is None else quantity.from_bytes(largest),
        }
    return objects


def is_current(found: CSIStorageCapacity, fields: dict[str, Any]) -> bool:
    """Whether a published object says what ``fields`` say."""
    meta = fields["metadata"]
    return (
        meta["labels"].items() <= found.metadata.labels.items()
        and [owner.uid for owner in found.metadata.owner_references]
        == [owner["uid"] for owner in meta["ownerReferences"]]
        and _bytes(found.capacity) == _bytes(fields["capacity"])
        and _bytes(found.maximum_volume_size) == _bytes(fields["maximumVolumeSize"])
    )


class CapacityPublisher:
    """Asks the provisioner what is left, and keeps the objects equal to its answers.

    The leader does it for all replicas, in objects they share; where every instance has assets of
    its own (``node_name``, ``owns_assets``) each has objects of its own.
    """

    def __init__(
        self,
        *,
        provisioner: Provisioner[Any, Any],
        settings: Settings,
        client: Client,
        author: Author,
        classes: Lister[StorageClass],
        metrics: Metrics,
        is_leader: Callable[[], bool] = lambda: True,
        is_mine: Callable[[PersistentVolume], bool] = lambda _: True,
        abandon: Callable[[threading.Thread], bool] = lambda _: False,
    ) -> None:
        """The objects go to the namespace of ``client``. ``is_mine``: whose volumes change what is
        left; ``abandon``: whether ``stop`` need not wait for a thread, because it hangs."""
        self._provisioner = provisioner
        self._names = tuple(name for name in settings.names if can_have_driver(name))
        self._used = bool(self._names) and overrides(provisioner, "available_capacity")
        self._interval_s = settings.capacity_poll_interval
        self._backoff = Backoff(start_s=1.0, max_s=self._interval_s, jitter=0.1)
        self._client = client.guarded(self._may_publish)
        self._author = author
        self._classes = classes
        self._is_leader = is_leader
        self._is_mine = is_mine
        self._abandon = abandon
        self._published = 0
        self._told: set[tuple[str, str]] = set()
        self._stopping = threading.Event()
        self._wanted = threading.Event()
        self._thread = threading.Thread(target=self._run, name="capacity", daemon=True)
        if self._used:
            metrics.gauge(
                "external_storage_published_capacities",
                "CSIStorageCapacity objects that this instance keeps",
                lambda: self._published,
            )

    # -- life

    def start(self) -> None:
        """Publish from now on; nothing for who has no ``available_capacity``. The classes must be
        there: the objects of a class that is not known are removed."""
        if self._used:
            self._thread.start()
        elif overrides(self._provisioner, "available_capacity"):
            log.info("what is left is not published: no CSIDriver can have the provisioner's name")

    def stop(self, timeout_s: float) -> bool:
        """End it; False if a call of the author's code goes on after ``timeout_s``."""
        self._stopping.set()
        self._wanted.set()
        if self._thread.ident is None or self._abandon(self._thread):
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def soon(self) -> None:
        """Look again in about a second; several wishes become one."""
        self._wanted.set()

    def on_volume(self, change: Change[PersistentVolume]) -> None:
        """Handler for the informer: a volume that comes, goes or grows changes what is left."""
        old, new = change.old, change.new
        volume = new or old
        same = old is not None and new is not None and old.spec.capacity == new.spec.capacity
        if self._used and not same and volume is not None and self._is_mine(volume):
            self.soon()

    def on_class(self, change: Change[StorageClass]) -> None:
        """Handler for the informer."""
        self.soon()

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            self._wanted.clear()
            failures = 0 if self.publish() else failures + 1
            pause_s = self._backoff.delay(failures) if failures else self._interval_s
            if self._wanted.wait(pause_s):
                self._stopping.wait(_DEBOUNCE_S)

    # -- one round

    def publish(self) -> bool:
        """One round; False if some of it failed, which has been logged. Raises nothing."""
        try:
            complete = not self._may_publish() or self._round()
        except NotAllowed:
            # Another replica has become the leader.
            complete = True
        except KubeError as error:
            self._tell("the API server", error)
            complete = False
        except Exception as error:
            self._tell("a defect", error)
            complete = False
        if not self._may_publish():
            self._published = 0
        if complete and self._told:
            self._told.clear()
            log.info("what is left is published again")
        return complete

    def _may_publish(self) -> bool:
        return works_alone(self._provisioner) or self._is_leader()

    def _round(self) -> bool:
        instance = instance_of(self._provisioner)
        node = self._node()
        reported = self._reported() if node is not None or not self._provisioner.node_name else []
        found = {item.name: item for item in self._list(instance)}
        wanted: dict[str, dict[str, Any]] = {}
        kept: set[str] = set()
        complete = True
        for storage_class in reported:
            try:
                entries = self._author.available_capacity(storage_class)
                wanted |= capacity_objects(storage_class, entries, instance=instance, node=node)
            except (Exception, SystemExit) as error:
                self._tell(f"class {storage_class.name}", error)
                kept |= {n for n, i in found.items() if i.storage_class_name == storage_class.name}
                complete = False
            if self._stopping.is_set():
                return True
        complete &= self._apply(found, wanted, kept)
        self._published = len(wanted.keys() | kept)
        return complete

    def _apply(
        self,
        found: dict[str, CSIStorageCapacity],
        wanted: dict[str, dict[str, Any]],
        kept: set[str],
    ) -> bool:
        """Make ``found`` what is ``wanted``; the new come before the obsolete go."""
        complete = True
        for name, fields in wanted.items():
            try:
                self._save(found.get(name), fields)
            except StatusError as error:
                # What is wrong with one is no reason to leave the others.
                self._tell(f"class {fields['storageClassName']}", error)
                complete = False
        for name in found.keys() - wanted.keys() - kept:
            self._remove(found[name])
        return complete

    def _save(self, found: CSIStorageCapacity | None, fields: dict[str, Any]) -> None:
        namespace, name = self._client.namespace, fields["metadata"]["name"]
        if found is None:
            try:
                self._client.create(CSIStorageCapacity, fields, namespace=namespace)
            except AlreadyExists:
                # Made by a request whose answer was lost, or somebody took our labels off it.
                self._client.patch(CSIStorageCapacity, name, fields, namespace=namespace)
        elif not is_current(found, fields):
            self._client.patch(CSIStorageCapacity, name, fields, namespace=namespace)

    def _remove(self, found: CSIStorageCapacity) -> None:
        try:
            self._client.delete(
                CSIStorageCapacity, found.name, uid=found.uid, namespace=found.namespace
            )
        except (NotFound, Conflict):
            return

    def _list(self, instance: str) -> list[CSIStorageCapacity]:
        names = ",".join(self._names)
        return self._client.list_all(
            CSIStorageCapacity,
            namespace=self._client.namespace,
            label_selector=(
                f"{LABEL_MANAGED_BY}={managed_by(instance)},{LABEL_PROVISIONER} in ({names})"
            ),
        )

    def _reported(self) -> list[StorageClass]:
        """The classes that the scheduler asks about."""
        waiting = [
            storage_class
            for storage_class in self._classes.all()
            if storage_class.provisioner in self._names
            and storage_class.volume_binding_mode == BINDING_WAIT
        ]
        drivers = {name for name in {c.provisioner for c in waiting} if self._is_asked_for(name)}
        return [storage_class for storage_class in waiting if storage_class.provisioner in drivers]

    def _is_asked_for(self, name: str) -> bool:
        driver = self._client.find(CSIDriver, name)
        return driver is not None and driver.spec.storage_capacity is True

    def _node(self) -> Node | None:
        """The node we serve; None: all of them, or ours is gone."""
        name = self._provisioner.node_name
        return None if name is None else self._client.find(Node, name)

    def _tell(self, about: str, error: BaseException) -> None:
        """Once for each reason, until all is well again."""
        reason = (about, type(error).__name__)
        text = "what is left cannot be published"
        if reason in self._told:
            log.debug(text, about=about, error=str(error))
        elif isinstance(error, (ProvisionerError, KubeError)):
            log.warning(text, about=about, error=str(error))
        else:
            # A defect, for its author.
            log.exception(text, exc=error, about=about, error=str(error))
        self._told.add(reason)


def _owner(node: Node) -> dict[str, str]:
    return {
        "apiVersion": node.API_VERSION,
        "kind": node.KIND,
        "name": node.name,
        "uid": node.uid,
    }


def _bytes(text: str | None) -> int | None:
    return None if text is None else quantity.to_bytes(text)


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
