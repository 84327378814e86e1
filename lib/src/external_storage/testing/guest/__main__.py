"""``python -m external_storage.testing.guest``: a guest in the foreground, or one command in it."""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import threading

from external_storage.testing.guest.errors import GuestError
from external_storage.testing.guest.guest import Guest
from external_storage.testing.guest.machine import Hardware
from external_storage.testing.guest.snapshot import ensure_snapshot

_HELP = """
The guest is up; Ctrl-C ends it and its disks. In another shell:

  {ssh}

It calls this machine's 127.0.0.1 {host}. Its console and QEMU's log are in {directory}
"""


def main() -> int:
    """The command's exit code; without one 0 when it was ended by a signal, 1 when it failed."""
    parser = argparse.ArgumentParser(
        prog="guest", description="Runs a virtual machine with a storage kernel until Ctrl-C."
    )
    parser.add_argument("--build", action="store_true", help="build its image and start nothing")
    parser.add_argument("--memory", type=int, default=512, metavar="MIB", help="default: 512")
    parser.add_argument("command", nargs="*", help="run this in it, and end with its exit code")
    options = parser.parse_args()
    # Both raise in the main thread wherever it is, so that leaving the context clears up. SIGINT is
    # set too: a shell script's background job would ignore it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        if options.build:
            print(ensure_snapshot(Hardware(memory_mib=options.memory))[0].directory)
            return 0
        with Guest(memory_mib=options.memory) as guest:
            if options.command:
                return subprocess.run([*guest.ssh, shlex.join(options.command)]).returncode
            print(_HELP.format(**_facts(guest)), flush=True)
            never = threading.Event()
            while guest.running:
                never.wait(1.0)
            raise GuestError(f"it has ended by itself; {guest.console()}")
    except GuestError as error:
        print(f"guest: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130 if options.command else 0


def _facts(guest: Guest) -> dict[str, object]:
    return {"ssh": shlex.join(guest.ssh), "host": guest.host, "directory": guest.directory}


if __name__ == "__main__":
    sys.exit(main())
