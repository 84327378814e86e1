"""The command ``efs-provisioner``."""

from __future__ import annotations

from typing import NoReturn

from efs_provisioner.cli import COMMANDS
from efs_provisioner.provisioner import EfsProvisioner
from external_storage import run

DEFAULT_NAME = "example.com/efs"


def main() -> NoReturn:
    """Run until SIGTERM; or one of the operator's commands."""
    run(EfsProvisioner, name=DEFAULT_NAME, commands=COMMANDS)


if __name__ == "__main__":
    main()
