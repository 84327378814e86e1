"""What the provisioner needs of a storage host, whatever it is reached by.

Every method may be called again after a crash: it finds its own work, and what is gone already is
a success. They are called from several threads at once. What happened is told by the exceptions of
the library:

- ``Unchanged``: the host was not asked, or only asked to tell something.
- ``ProvisioningFailed``: it refused, and nothing of this call is left.
- ``ProvisioningInBackground``: it was asked to change something and has not answered.
- ``Infeasible``: it cannot, however often it is asked. ``VolumeInUse``: a node is logged in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from external_storage import Deadline, ProvisioningInBackground, Unchanged
from iscsi_targetd_provisioner.chap import Chap
from iscsi_targetd_provisioner.names import Portal


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A place that volumes are made in: a volume group, or ``group/thin-pool``."""

    name: str
    size: int
    free: int
    """Bytes that can still be promised to volumes."""
    thin: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A volume on the host."""

    pool: str
    name: str
    size: int
    """Bytes it really has: hosts round up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """By what nodes reach a volume."""

    iqn: str
    lun: int
    refused: frozenset[str] = field(default=frozenset(), compare=False)
    """Initiators that the host does not take the name of: all others have their access."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A volume as the host exports it now."""

    volume: str
    pool: str
    target: Target
    initiators: frozenset[str]
    logged_in: frozenset[str] = frozenset()
    """Those of them that have a session; empty where the host does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may reach a volume, and how."""

    initiators: Collection[str]
    portals: Sequence[Portal] = ()
    """What the target listens on, where that can be chosen."""
    iqn: str = ""
    """Name of the target, or what the names of targets begin with; empty: the host's own."""
    chap: Chap | None = field(default=None, repr=False)
    lun: int | None = None
    """The LUN that nodes know the volume by already: this one or none. None: any that is free."""
    avoid: Collection[int] = ()
    """LUNs that nodes know other volumes by, also while these are not exported."""


@contextmanager
def begun() -> Iterator[None]:
    """Around what follows a change: not to be able to ask is then not to know."""
    try:
        yield
    except Unchanged as error:
        raise ProvisioningInBackground(str(error)) from error


class Grade(StrEnum):
    """How bad a finding is."""

    GOOD = "ok"
    WARNING = "warning"
    BAD = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """What ``doctor`` found, and what to do about it."""

    grade: Grade
    text: str
    advice: str = ""


class Backend(ABC):
    """One storage host."""

    name: str
    """The server's name in the configuration."""
    enforces_chap: bool = True
    """Whether a target refuses who does not know the secret."""
    tells_sessions: bool = True
    """Whether ``exports`` knows who is logged in: where it does not, nobody's access is taken away
    while the volume is there, since it may be in use."""

    @property
    @abstractmethod
    def configured_pools(self) -> Collection[str]:
        """The pools that the configuration names; none: all that the host has."""

    def may_use(self, pool: str) -> bool:
        """Whether the configuration lets us make volumes in a pool."""
        return not self.configured_pools or pool in self.configured_pools

    @abstractmethod
    def pools(self, deadline: Deadline) -> list[Pool]:
        """The pools that we may use."""

    @abstractmethod
    def volumes(self, deadline: Deadline) -> list[Volume]:
        """Our volumes in these pools; where ownership cannot be told, all volumes."""

    def find(self, name: str, deadline: Deadline) -> list[Volume]:
        """What there is of this name that we may have made, also where it was not meant to be."""
        return [volume for volume in self.volumes(deadline) if volume.name == name]

    @abstractmethod
    def exports(self, deadline: Deadline) -> list[Export]:
        """What is exported of these volumes."""

    @abstractmethod
    def create(self, pool: str, name: str, size: int, *, deadline: Deadline) -> Volume:
        """Make a volume of at least ``size`` bytes; one of ours with this name is taken over."""

    @abstractmethod
    def destroy(self, pool: str, name: str, *, deadline: Deadline) -> None:
        """Remove a volume that is not exported. Raises ``VolumeInUse`` while it is."""

    @abstractmethod
    def resize(self, pool: str, name: str, size: int, *, deadline: Deadline) -> Volume:
        """Grow a volume to at least ``size`` bytes, with its export; never smaller."""

    @abstractmethod
    def export(self, pool: str, name: str, access: Access, *, deadline: Deadline) -> Target:
        """Have exactly these initiators reach the volume, with this CHAP.

        An initiator that is logged in keeps its access also when it is not listed, and the CHAP
        that it logged in with. What is exported under another LUN than ``access`` says is left as
        it is, and is an error: nodes would find a disk where they know another one.
        """

    @abstractmethod
    def unexport(self, pool: str, name: str, *, deadline: Deadline) -> None:
        """End every export of the volume. Raises ``VolumeInUse`` while a node is logged in."""

    @abstractmethod
    def set_auth(
        self, pool: str, name: str, access: Access, *, deadline: Deadline
    ) -> frozenset[str]:
        """Replace the CHAP of an exported volume.

        Returns the initiators that are logged in, and so keep what they logged in with: open-iscsi
        reconnects a session with the secret that it began with.
        """

    @abstractmethod
    def check(self, deadline: Deadline) -> list[Finding]:
        """Look at everything that an admin has to set up. Raises nothing that it can tell."""

    def check_access(self, name: str, access: Access) -> None:  # noqa: B027 - most take all
        """Raises ``Infeasible`` for what the host cannot do, before it is asked for anything."""

    def close(self) -> None:  # noqa: B027 - for most there is nothing to do
        """Let go of connections."""
