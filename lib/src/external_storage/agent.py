"""The contract of a program that no claim drives: an agent that looks after what a node has.

It is run as a provisioner is (``run``): the same flags, signals, logs, health, metrics and exit
codes, with informers and loops of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar, get_args

from external_storage.events import EventRecorder
from external_storage.health import Health
from external_storage.metrics import Metrics
from external_storage.settings import ProgramSettings

if TYPE_CHECKING:
    from external_storage.kube.client import Client

S = TypeVar("S", bound=ProgramSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentContext:
    """What the library hands to an agent when it is built."""

    name: str
    """The program's name: the source of its events."""
    namespace: str
    """The namespace we run in."""
    client: Client
    events: EventRecorder
    metrics: Metrics


class Agent(ABC, Generic[S]):
    """Base class: ``class LocalVolumes(Agent[LocalVolumeSettings])``."""

    settings_type: ClassVar[type[ProgramSettings]] = ProgramSettings

    def __init__(self, settings: S, context: AgentContext) -> None:
        """Keep it free of work: ``start`` is the place for that."""
        self.settings = settings
        self.context = context

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__dict__.get("__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, ProgramSettings):
                    cls.settings_type = argument

    @abstractmethod
    def start(self) -> None:
        """Start informers and threads; ``CannotStart`` says what the admin has to change."""

    @abstractmethod
    def stop(self, timeout_s: float) -> bool:
        """End them within ``timeout_s``; False if work was cut off. Called also when ``start``
        has failed half-way."""

    @abstractmethod
    def health(self) -> Health:
        """The checks behind ``/healthz`` and ``/readyz``; asked for once, before ``start``."""

    def pages(self) -> Mapping[str, Callable[[], bytes]]:
        """JSON documents to serve beside them, by path."""
        return {}
