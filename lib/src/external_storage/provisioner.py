"""The contract between the library and the author of a provisioner.

An author writes a class with ``provision`` and ``delete``. The library watches claims, classes and
volumes, decides what is to be done, calls these two from a worker thread, and carries the result
to the API server: it builds the PersistentVolume, saves it, tells the user by events, retries.

Three promises are asked of an author in return:

- **Call me again.** ``provision`` may be called again for a volume that it made before a crash, and
  must find its own work; ``delete`` of what is gone is a success.
- **One name.** ``request.volume_name`` is unique for ever; name the asset by it.
- **Raise what happened.** The exceptions of ``errors.py`` say whether something may still be
  running, whether a retry makes sense, and when. Any other counts as ``ProvisioningFailed``.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_args

from external_storage import deadline
from external_storage.assets import AssetRecord, Records
from external_storage.deadline import Deadline
from external_storage.events import EventRecorder
from external_storage.kube.names import ACCESS_MODES
from external_storage.kube.types import (
    PersistentVolume,
    PersistentVolumeClaim,
    StorageClass,
    VolumeAttributesClass,
    VolumeNodeAffinity,
)
from external_storage.metrics import Metrics
from external_storage.owner import Owner, OwnerUnknown
from external_storage.parameters import NoParameters, Parameters
from external_storage.settings import Settings

if TYPE_CHECKING:
    from external_storage.kube.client import Client

VolumeHandler = Callable[[PersistentVolume | None, PersistentVolume | None], None]
"""Given the volume as it was (None: it is new) and as it is (None: it is gone); must not block."""

S = TypeVar("S", bound=Settings)
P = TypeVar("P", bound=Parameters)


def _unknown_owner() -> Owner:
    raise OwnerUnknown("this context was built without an owner")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvisionRequest(Generic[P]):
    """What is asked of ``provision``."""

    volume_name: str
    """Name of the PersistentVolume to be; unique for ever."""
    claim: PersistentVolumeClaim
    storage_class: StorageClass
    parameters: P
    """The class parameters, already checked."""
    capacity: int
    """Bytes the claim asks for; the volume must have at least as many."""
    selected_node: str | None
    """The node the scheduler chose, for classes that wait for the first consumer."""
    deadline: Deadline
    source_volume: PersistentVolume | None = None
    """The volume to be cloned: ours, Bound to a claim of the same namespace, not larger."""
    volume_attributes: VolumeAttributesClass | None = None
    """The VolumeAttributesClass that the claim names, for who ``supports_volume_attributes``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvisionedVolume:
    """What ``provision`` made; the library builds the PersistentVolume from it."""

    source: Mapping[str, Any]
    """One entry of a PersistentVolume's spec: ``{"nfs": {"server": ..., "path": ...}}``."""
    capacity: int | None = None
    """Bytes; None means exactly what was asked for. Less than was asked for is refused."""
    mount_options: Sequence[str] = ()
    """Options the volume cannot be mounted without; the class's own options follow them."""
    gid: int | None = None
    """Group that owns the data: the kubelet adds it to every container of a pod with the volume."""
    node_affinity: VolumeNodeAffinity | None = None
    """From which nodes it can be used; None: wherever the class's ``allowedTopologies`` say."""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Expanded:
    """What ``expand`` did."""

    capacity: int
    """Bytes the volume has now: at least as many as were asked for."""
    node_step: bool = False
    """Whether the kubelet has to grow the file system before users see the new size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AvailableCapacity:
    """What is left on one set of nodes, for the scheduler."""

    capacity: int
    """Bytes."""
    topology: Mapping[str, str] = field(default_factory=dict)
    """Labels of the nodes that reach it; empty: all nodes do."""
    maximum_volume_size: int | None = None
    """Bytes of the largest volume that can be made, if less than ``capacity``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the library hands to a provisioner when it is built."""

    name: str
    """The provisioner name: the ``provisioner`` of its classes."""
    namespace: str
    """The namespace we run in."""
    client: Client
    """For reads of other objects; volumes and claims are the library's to write."""
    events: EventRecorder
    """For events of the provisioner's own; those about the work on claims are written for it."""
    metrics: Metrics
    """Where a provisioner adds metrics of its own, in ``start``."""
    owner: Callable[[], Owner] = _unknown_owner
    """Who we are, in this cluster and among others: for what several can reach. Asks the API server
    the first time, and raises ``OwnerUnknown``; needs the right to get the namespace kube-system.
    """
    reconcile_soon: Callable[[], None] = lambda: None
    """Have ``reconcile`` called as soon as may be."""
    watch_volumes: Callable[[VolumeHandler], None] = lambda _handler: None
    """Have a handler told of each volume of our provisioner name that comes, changes or goes, on
    every replica; call it in ``start``. By the first call of ``provision`` it knows them all."""
    add_part: Callable[[str, Callable[[], None], Callable[[float], object]], None] = (
        lambda _name, _start, _stop: None
    )
    """``Manager.add``, for informers and threads of the provisioner's own; call it in ``start``."""


class Provisioner(ABC, Generic[S, P]):
    """Base class: ``class HostPath(Provisioner[HostPathSettings, HostPathParameters])``.

    ``provision``, ``delete`` and ``expand`` are called from several threads at once, but never
    twice at the same time for one volume. The attributes below are declarations: set them on the
    class, or in ``__init__`` or ``start`` where settings decide.
    """

    settings_type: ClassVar[type[Settings]] = Settings
    parameters_type: ClassVar[type[Parameters]] = NoParameters

    supports_block: bool = False
    """Claims with ``volumeMode: Block`` can be served."""
    supports_clone: bool = False
    """Claims whose data source is another claim can be served."""
    supports_volume_attributes: bool = False
    """Claims that name a VolumeAttributesClass can be served."""
    access_modes: frozenset[str] = ACCESS_MODES
    """What claims may ask for; all four by default."""
    durable_intent: bool = False
    """For back ends beside which no record can be written: a finalizer keeps the claim from before
    the first call until its volume is saved, so that nothing begun is forgotten."""
    owns_assets: bool = False
    """Only this instance can reach the assets it makes: it deletes, expands and reconciles them
    leader or not, and the lease decides only who takes new claims. Needs ``may_delete``."""
    identity: str = ""
    """Which instance this is, the same after a restart, for who ``owns_assets``; empty: the name
    of its host. Each publishes its own ``available_capacity``."""
    node_name: str | None = None
    """Serve only claims whose selected node this is, and only volumes that are usable there."""
    reconcile_interval_s: float = 600.0
    """How often ``reconcile`` is called."""
    records: Records | None = None
    """Set it in ``start`` when the provisioner keeps asset records, and override ``discard``: the
    library publishes the record of each saved volume, and has those discarded that a crash left."""

    def __init__(self, settings: S, context: Context) -> None:
        """Keep it free of work: ``start`` is the place for that."""
        self.settings = settings
        self.context = context

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__dict__.get("__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, Settings):
                    cls.settings_type = argument
                elif isinstance(argument, type) and issubclass(argument, Parameters):
                    cls.parameters_type = argument

    @property
    def deadline(self) -> Deadline:
        """By when the call that this thread is in has to be over."""
        return deadline.current()

    @abstractmethod
    def provision(self, request: ProvisionRequest[P]) -> ProvisionedVolume:
        """Make the asset for ``request.volume_name``, or find the one made by an earlier call."""

    @abstractmethod
    def delete(self, volume: PersistentVolume) -> None:
        """Remove the asset of ``volume``; nothing there is a success."""

    def expand(self, volume: PersistentVolume, capacity: int) -> Expanded:
        """Grow the asset of ``volume`` to at least ``capacity`` bytes; being there is a success."""
        raise NotImplementedError

    def discard(self, record: AssetRecord) -> None:
        """Remove the asset of a record that was never published, and forget the record.

        Its claim and its volume are gone. Nothing there is a success.
        """
        raise NotImplementedError

    def start(self) -> None:
        """Called once, before the first claim is looked at; an exception ends the process."""

    def stop(self) -> None:
        """Called once, after the last call has returned."""

    def lead(self) -> None:
        """Called each time that this replica gets the lease, before it works: another one may have
        worked since, so what was learnt of the back end may be void. Must not block. Not called
        without leader election."""

    def accepts(self, claim: PersistentVolumeClaim) -> bool:
        """Whether a claim of one of our classes is for this instance; False leaves it alone."""
        return True

    def may_delete(self, volume: PersistentVolume) -> bool:
        """Whether a volume with our provisioner name is this instance's to delete and expand."""
        return True

    def check(self) -> str | None:
        """Why no work may be taken at this moment, or None. Claims wait and an event says why."""
        return None

    def trouble(self) -> str | None:
        """What is wrong with a part of the back end while work goes on with the rest, or None;
        ``/healthz?verbose`` shows it."""
        return None

    def data_path(self) -> str | None:
        """Why the data path that this pod serves is down, or None; readiness follows it alone.

        A provisioner without a data path of its own leaves this as it is.
        """
        return None

    def reconcile(self, volumes: Sequence[PersistentVolume]) -> None:
        """Called after the first sync, every ``reconcile_interval_s`` and on demand, with all
        volumes of our provisioner name: compare them with what is there. One call at a time."""

    def available_capacity(self, storage_class: StorageClass) -> Iterable[AvailableCapacity] | None:
        """What is left for volumes of the class, published for the scheduler; None: not known.

        Asked about classes that wait for the first consumer, where a CSIDriver object of our name
        has ``storageCapacity: true``; then a node of which nothing is known is never chosen.
        """
        return None


def overrides(provisioner: Provisioner[Any, Any], method: str) -> bool:
    """Whether the author has written this optional method."""
    return getattr(type(provisioner), method) is not getattr(Provisioner, method)


def works_alone(provisioner: Provisioner[Any, Any]) -> bool:
    """Whether nobody else can reach what is made here, so that nothing can be double: its work
    needs no lease. Known from ``start`` on."""
    return provisioner.owns_assets or provisioner.node_name is not None


def instance_of(provisioner: Provisioner[Any, Any]) -> str:
    """Which instance this is, for what it alone can reach: its assets, or those of its node; empty
    where every replica can reach all."""
    if provisioner.node_name is not None:
        return provisioner.node_name
    if provisioner.owns_assets:
        return provisioner.identity or socket.gethostname()
    return ""
