"""The command ``local-volume-provisioner``: the agent of one node."""

from __future__ import annotations

from typing import NoReturn

from external_storage import run
from local_volume_provisioner.provisioner import LocalVolumeProvisioner

NAME = "local-volume-provisioner"


def main() -> NoReturn:
    """Run until SIGTERM."""
    run(LocalVolumeProvisioner, name=NAME)


if __name__ == "__main__":
    main()
