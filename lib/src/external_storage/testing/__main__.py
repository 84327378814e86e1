"""``python -m external_storage.testing``: a control plane in the foreground, for playing with."""

from __future__ import annotations

import argparse
import signal
import sys
import threading

from external_storage.testing.access import ControlPlaneError
from external_storage.testing.binaries import BinariesError
from external_storage.testing.controlplane import ControlPlane

_HELP = """
The control plane is ready at {url}; Ctrl-C ends it and its data. In another shell:

  export KUBECONFIG={kubeconfig}
  {kubectl} get namespaces

There is no node: pods are stored, never run. Logs are {directory}/*.log
"""


def main() -> int:
    """Exit code 0 when it was ended by a signal, 1 when it could not start or has failed."""
    parser = argparse.ArgumentParser(
        prog="controlplane", description="Runs a Kubernetes control plane on loopback until Ctrl-C."
    )
    parser.add_argument("--scheduler", action="store_true", help="run kube-scheduler too")
    parser.add_argument("--audit", action="store_true", help="keep an audit log, audit.log")
    options = parser.parse_args()
    # Both raise in the main thread wherever it is, so that leaving the context clears up. SIGINT is
    # set too: a shell script's background job would ignore it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with ControlPlane(scheduler=options.scheduler, audit=options.audit) as running:
            print(_HELP.format(**_facts(running)), flush=True)
            ended = _wait_for_end(running)
    except (BinariesError, ControlPlaneError) as error:
        print(f"controlplane: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    print(f"controlplane: {ended}", file=sys.stderr)
    return 1


def _facts(running: ControlPlane) -> dict[str, object]:
    return {
        "url": running.url,
        "kubeconfig": running.kubeconfig,
        "kubectl": running.program("kubectl"),
        "directory": running.directory,
    }


def _wait_for_end(running: ControlPlane) -> str:
    """Until a process ends by itself, which it should not: its name and the end of its log."""
    never = threading.Event()
    while (ended := running.ended()) is None:
        never.wait(1.0)
    return ended


if __name__ == "__main__":
    sys.exit(main())
