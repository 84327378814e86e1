"""``python -m external_storage.testing.binaries``: find or build the programs, say where."""

from __future__ import annotations

import sys

from external_storage.testing.binaries import BinariesError, ensure


def main() -> int:
    """Exit code 0 when they are there, 1 when they cannot be had."""
    try:
        print(ensure().source)
    except BinariesError as error:
        print(f"control plane: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
