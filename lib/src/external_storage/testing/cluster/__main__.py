"""``python -m external_storage.testing.cluster``: a cluster in the foreground, to play with."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from external_storage.testing.access import ControlPlaneError
from external_storage.testing.binaries import BinariesError
from external_storage.testing.cluster.cluster import Cluster
from external_storage.testing.guest import GuestError

_HELP = """
The cluster is ready; Ctrl-C ends it. In another shell:

  export KUBECONFIG={kubeconfig}
  {kubectl} get nodes
  {kubectl} run a --image={tools_image} -- sleep 1000

Its nodes pull nothing: load images with --load. There is no DNS. Logs are {directory}/*.log
A shell on the node: nsenter --target {init} --all
"""


def main() -> int:
    """Exit code 0 when it was ended by a signal, 1 when it could not start or has failed."""
    parser = argparse.ArgumentParser(
        prog="cluster", description="Runs a Kubernetes cluster that runs pods, until Ctrl-C."
    )
    keep = "keep etcd, images and volumes there, for the next time"
    parser.add_argument("--keep-state", type=Path, metavar="DIR", help=keep)
    parser.add_argument("--load", type=Path, action="append", default=[], metavar="ARCHIVE")
    parser.add_argument("--guest", action="store_true", help="a second node, with NFS and iSCSI")
    options = parser.parse_args()
    # Both raise in the main thread wherever it is, so that leaving the context clears up. SIGINT is
    # set too: a shell script's background job would ignore it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with Cluster(state=options.keep_state) as running:
            for archive in options.load:
                print(f"loaded {', '.join(running.load_image(archive))}", flush=True)
            if options.guest:
                running.add_guest()
            print(_HELP.format(**_facts(running)), flush=True)
            ended = _wait_for_end(running)
    except (BinariesError, ControlPlaneError, GuestError) as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    print(f"cluster: {ended}", file=sys.stderr)
    return 1


def _facts(running: Cluster) -> dict[str, object]:
    return {
        "kubeconfig": running.kubeconfig,
        "kubectl": running.program("kubectl"),
        "directory": running.directory,
        "tools_image": running.tools_image,
        "init": running.first_process,
    }


def _wait_for_end(running: Cluster) -> str:
    """Until a process ends by itself, which it should not: its name and the end of its log."""
    never = threading.Event()
    while (ended := running.ended()) is None:
        never.wait(1.0)
    return ended


if __name__ == "__main__":
    sys.exit(main())
