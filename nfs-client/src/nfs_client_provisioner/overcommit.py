"""How much may be promised of a server's space, which nobody enforces."""

from __future__ import annotations

from external_storage import EventRecorder, PersistentVolumeClaim, ProvisioningFailed
from external_storage.kube import quantity
from nfs_client_provisioner.ledger import Ledger
from nfs_client_provisioner.servers import OvercommitAction
from nfs_client_provisioner.shares import Mounted


class Overcommit:
    """Compares what was promised on a server with the size of its file system."""

    def __init__(self, ledger: Ledger, events: EventRecorder) -> None:
        self._ledger = ledger
        self._events = events

    def admit(
        self, mounted: Mounted, name: str, *, capacity: int, claim: PersistentVolumeClaim
    ) -> None:
        """Let the volume ``name`` have ``capacity`` bytes, or tell its claim's user why not.

        Raises ``ProvisioningFailed`` where the server's setting is to refuse, ShareUnavailable.
        """
        server = mounted.server
        if server.overcommit is None:
            return
        limit = int(mounted.size() * server.overcommit)
        promised = self._ledger.promised(server.name, without=name)
        if promised + capacity <= limit:
            return
        text = (
            f"server {server.name!r} has promised {_text(promised)}, and {_text(capacity)} more "
            f"would be above its limit of {_text(limit)} ({server.overcommit:g} times its size)"
        )
        if server.overcommit_action is OvercommitAction.REFUSE:
            raise ProvisioningFailed(text)
        self._events.warning(claim, "Overcommitted", text)


def _text(size: int) -> str:
    return quantity.from_bytes(size)
