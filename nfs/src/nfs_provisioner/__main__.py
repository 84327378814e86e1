"""The command ``nfs-provisioner``."""

from __future__ import annotations

from typing import NoReturn

from external_storage import run
from nfs_provisioner.provisioner import NfsProvisioner

DEFAULT_NAME = "example.com/nfs"


def main() -> NoReturn:
    """Run until SIGTERM."""
    run(NfsProvisioner, name=DEFAULT_NAME)


if __name__ == "__main__":
    main()
