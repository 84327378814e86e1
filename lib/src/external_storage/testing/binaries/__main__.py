"""``python -m external_storage.testing.binaries``: find or build the programs, say where."""

from __future__ import annotations

import argparse
import sys

from external_storage.testing.binaries import CONTROL_PLANE, NODE, BinariesError, ensure


def main() -> int:
    """Exit code 0 when they are there, 1 when they cannot be had."""
    parser = argparse.ArgumentParser(prog="binaries", description=__doc__)
    parser.add_argument("--node", action="store_true", help="the node's too")
    wanted = (CONTROL_PLANE, NODE) if parser.parse_args().node else (CONTROL_PLANE,)
    try:
        print(ensure(wanted).source)
    except BinariesError as error:
        print(f"{wanted[-1].title}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
