"""The command ``nfs-client-provisioner``."""

from __future__ import annotations

from typing import NoReturn

from external_storage import run
from nfs_client_provisioner.cli import COMMANDS
from nfs_client_provisioner.provisioner import NfsClientProvisioner

# For trying it: everybody sets one of their own, in a domain that is theirs.
DEFAULT_NAME = "example.com/nfs-client"


def main() -> NoReturn:
    """Run until SIGTERM; or one of the operator's commands."""
    run(NfsClientProvisioner, name=DEFAULT_NAME, commands=COMMANDS)


if __name__ == "__main__":
    main()
