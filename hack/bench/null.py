"""A provisioner with no storage behind it: what is measured is the library."""

from __future__ import annotations

import time

from external_storage import (
    Parameters,
    PersistentVolume,
    ProvisionedVolume,
    Provisioner,
    ProvisionRequest,
    Settings,
    run,
)


class NullParameters(Parameters):
    hang: bool = False
    """Answer no call before its deadline."""


class Null(Provisioner[Settings, NullParameters]):
    """Volumes that are nowhere."""

    def provision(self, request: ProvisionRequest[NullParameters]) -> ProvisionedVolume:
        if request.parameters.hang:
            time.sleep(request.deadline.remaining())
        return ProvisionedVolume(source={"hostPath": {"path": f"/tmp/null/{request.volume_name}"}})

    def delete(self, volume: PersistentVolume) -> None:
        return


if __name__ == "__main__":
    run(Null, name="bench/null")
