"""The command ``new-store-provisioner``."""

from __future__ import annotations

from typing import NoReturn

from external_storage import run
from new_store_provisioner.provisioner import NewStoreProvisioner

# REPLACE: a name in a domain of yours; classes name it as their provisioner.
DEFAULT_NAME = "example.com/new-store"


def main() -> NoReturn:
    """Run until SIGTERM."""
    run(NewStoreProvisioner, name=DEFAULT_NAME)


if __name__ == "__main__":
    main()
