"""The command ``efs-provisioner``."""

from __future__ import annotations

import sys
from typing import NoReturn

from efs_provisioner import cli
from efs_provisioner.provisioner import EfsProvisioner
from external_storage import run

DEFAULT_NAME = "example.com/efs"


def main() -> NoReturn:
    """Run until SIGTERM; or one of the operator's commands."""
    if cli.is_command(sys.argv[1:]):
        cli.run_command(sys.argv[1:], name=DEFAULT_NAME)
    run(EfsProvisioner, name=DEFAULT_NAME)


if __name__ == "__main__":
    main()
