"""The contract between the library and the author of a provisioner.

An author writes a class with ``provision`` and ``delete``. The library watches claims, classes and
volumes, decides what is to be done, calls these two from a worker thread, and carries the result
to the API server: it builds the PersistentVolume, saves it, tells the user by events, retries.

Three promises are asked of an author in return:

- **Call me again.** ``provision`` may be called again for a volume that it made before a crash, and
  must find its own work; ``delete`` of what is gone is a success.
- **One name.** ``request.volume_name`` is unique for ever; name the asset by it.
- **Raise what happened.** The exceptions below say whether something may still be running, whether
  a retry makes sense, and when. Any other exception counts as ``ProvisioningFailed``.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_args

from external_storage.assets import AssetRecords
from external_storage.kube.types import (
    PersistentVolume,
    PersistentVolumeClaim,
    StorageClass,
    VolumeNodeAffinity,
)
from external_storage.metrics import Metrics
from external_storage.parameters import NoParameters, Parameters
from external_storage.settings import Settings

if TYPE_CHECKING:
    from external_storage.kube.client import Client

S = TypeVar("S", bound=Settings)
P = TypeVar("P", bound=Parameters)


class ProvisionerError(Exception):
    """Base of what ``provision`` and ``delete`` may raise; the text is shown to the user."""


class ProvisioningFailed(ProvisionerError):
    """It failed and nothing is running or left behind; try again with back-off."""


class ProvisioningInBackground(ProvisionerError):
    """The backend may still be at work: ask again until it has ended one way or the other."""


class Unchanged(ProvisionerError):
    """The backend could not even be asked; what was true before this try is still true."""


class Reschedule(ProvisionerError):
    """Not possible on the selected node: let the scheduler choose again."""


class Infeasible(ProvisionerError):
    """Cannot succeed until the claim or its class is changed: retry slowly."""


class Ignored(ProvisionerError):
    """Not ours after all, on purpose and without an event: leave it alone."""


class VolumeInUse(ProvisionerError):
    """From ``delete``: something still uses the volume, which is normal; try again quietly."""


class CannotStart(ProvisionerError):
    """From ``start``: what the admin has to change; the process ends with exit code 1."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """The moment by which a call has to be over; pass ``remaining()`` on as a timeout."""

    at: float
    clock: Callable[[], float] = time.monotonic

    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(self.at - self.clock(), 0.0)

    @property
    def expired(self) -> bool:
        return self.clock() >= self.at


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
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the library hands to a provisioner when it is built."""

    name: str
    """The provisioner name: the ``provisioner`` of its classes."""
    namespace: str
    """The namespace we run in."""
    client: Client
    """For reads of other objects; volumes and claims are the library's to write."""
    metrics: Metrics
    """Where a provisioner adds metrics of its own, in ``start``."""


class Provisioner(ABC, Generic[S, P]):
    """Base class: ``class HostPath(Provisioner[HostPathSettings, HostPathParameters])``.

    ``provision`` and ``delete`` are called from several threads at once, but never twice at the
    same time for one volume.
    """

    settings_type: ClassVar[type[Settings]] = Settings
    parameters_type: ClassVar[type[Parameters]] = NoParameters

    records: AssetRecords | None = None
    """Set it in ``start`` when the provisioner keeps asset records: the library then publishes the
    record of each volume that it has saved."""

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

    @abstractmethod
    def provision(self, request: ProvisionRequest[P]) -> ProvisionedVolume:
        """Make the asset for ``request.volume_name``, or find the one made by an earlier call."""

    @abstractmethod
    def delete(self, volume: PersistentVolume) -> None:
        """Remove the asset of ``volume``; nothing there is a success."""

    def start(self) -> None:
        """Called once, before the first claim is looked at; an exception ends the process."""

    def stop(self) -> None:
        """Called once, after the last call has returned."""

    def accepts(self, claim: PersistentVolumeClaim) -> bool:
        """Whether a claim of one of our classes is for this instance; False leaves it alone."""
        return True

    def may_delete(self, volume: PersistentVolume) -> bool:
        """Whether a released volume with our provisioner name is this instance's to delete."""
        return True

    def supports_block(self) -> bool:
        """Whether claims with ``volumeMode: Block`` can be served."""
        return False

    def check(self) -> str | None:
        """Why no work may be taken at this moment, or None. Claims wait and an event says why."""
        return None

    def data_path(self) -> str | None:
        """Why the data path that this pod serves is down, or None; readiness follows it alone.

        A provisioner without a data path of its own leaves this as it is.
        """
        return None
