"""The operator's commands: ``orphans`` and ``missing``, run beside the provisioner.

They take the provisioner's own settings (``kubectl exec deploy/nfs-client-provisioner --
nfs-client-provisioner orphans`` has those of the environment; the flags of the Deployment are to be
given again), change nothing unless told, and end with exit code 1 if there is something to look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import click

from external_storage.cli import EXIT_OK, Command, Commands, connected, print_found
from nfs_client_provisioner.inventory import Item, opened
from nfs_client_provisioner.settings import NfsClientSettings


def _orphans(settings: NfsClientSettings, forget: bool) -> int:
    with connected(settings) as client, opened(settings, client) as inventory:
        found = inventory.orphans()
        code = _print(found, "no PersistentVolume leads to these")
        if not forget:
            return code
        for item in found:
            click.echo(f"{item.volume}: {inventory.forget(item)}")
    return EXIT_OK


def _missing(settings: NfsClientSettings) -> int:
    with connected(settings) as client, opened(settings, client) as inventory:
        found = inventory.missing()
    return _print(found, "the directories of these volumes are not there")


COMMANDS: Final[Commands] = {
    "orphans": Command(
        "List directories of volumes whose PersistentVolume is gone.",
        _orphans,
        options=[
            click.Option(
                ["--forget"],
                is_flag=True,
                help="Forget them: their paths are free for claims again. Directories are never "
                "removed.",
            )
        ],
    ),
    "missing": Command("List volumes whose directory is not there.", _missing),
}


def _print(items: Sequence[Item], what: str) -> int:
    rows = [
        (i.place.server, i.place.path, "" if i.is_there else "(gone)", i.volume, i.claim)
        for i in items
    ]
    return print_found(what, ("server", "directory", "", "volume", "claim"), rows)
