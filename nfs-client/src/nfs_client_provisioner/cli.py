"""The operator's commands: ``orphans`` and ``missing``, run beside the provisioner.

They take the provisioner's own settings (``kubectl exec deploy/nfs-client-provisioner --
nfs-client-provisioner orphans`` has those of the environment; the flags of the Deployment are to be
given again), change nothing unless told, and end with exit code 1 if there is something to look at.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final, NoReturn

import click

from external_storage import Problems, ProvisionerError
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.errors import ConfigError, KubeError
from external_storage.main import EXIT_FAILED, EXIT_OK, EXIT_USAGE, build_command
from nfs_client_provisioner.inventory import Inventory, Item
from nfs_client_provisioner.provisioner import NfsClientProvisioner
from nfs_client_provisioner.settings import NfsClientSettings

_AGENT: Final = "external-storage-nfs-client-cli"
_FORGET: Final = (
    "Forget them: their paths are free for claims again. Directories are never removed."
)
_COMMANDS: Final = {
    "orphans": "List directories of volumes whose PersistentVolume is gone.",
    "missing": "List volumes whose directory is not there.",
}


def is_command(argv: Sequence[str]) -> bool:
    """Whether the arguments, without the program's name, begin with one of the commands."""
    return bool(argv) and argv[0] in _COMMANDS


def run_command(argv: Sequence[str], *, name: str) -> NoReturn:
    """Run it and exit; ``name`` is the provisioner name unless the settings have another."""
    command = _build(argv[0], name)
    try:
        result = command.main(args=list(argv[1:]), standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    sys.exit(result if isinstance(result, int) else EXIT_OK)


def _build(which: str, name: str) -> click.Command:
    def callback(**given: str | bool | None) -> int:
        forget = bool(given.pop("forget", False))
        texts = {"provisioner_name": name}
        texts |= {key: str(value) for key, value in given.items() if value is not None}
        try:
            settings = NfsClientSettings.from_texts(texts)
        except Problems as error:
            for problem in error.problems:
                click.echo(f"error: {problem}", err=True)
            return EXIT_USAGE
        return _with_client(which, settings, forget)

    options: list[click.Parameter] = list(build_command(NfsClientProvisioner, name=name).params)
    if which == "orphans":
        options.append(click.Option(["--forget", "forget"], is_flag=True, help=_FORGET))
    return click.Command(which, callback=callback, params=options, help=_COMMANDS[which])


def _with_client(which: str, settings: NfsClientSettings, forget: bool) -> int:
    try:
        config = auth.load(kubeconfig=settings.kubeconfig, master=settings.master)
        client = Client(config, user_agent=_AGENT)
        try:
            with Inventory(settings, client) as inventory:
                return _orphans(inventory, forget) if which == "orphans" else _missing(inventory)
        finally:
            client.close()
    except (ConfigError, KubeError, ProvisionerError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        return EXIT_FAILED


def _orphans(inventory: Inventory, forget: bool) -> int:
    found = inventory.orphans()
    _print(found, "no PersistentVolume leads to these")
    if not forget:
        return EXIT_FAILED if found else EXIT_OK
    for item in found:
        click.echo(f"{item.volume}: {inventory.forget(item)}")
    return EXIT_OK


def _missing(inventory: Inventory) -> int:
    found = inventory.missing()
    _print(found, "the directories of these volumes are not there")
    return EXIT_FAILED if found else EXIT_OK


def _print(items: Sequence[Item], what: str) -> None:
    """A table in plain columns: it is read by grep as well as by people."""
    if not items:
        click.echo("nothing found")
        return
    click.echo(f"{what}:")
    lines = [("server", "directory", "", "volume", "claim")]
    lines += [
        (i.place.server, i.place.path, "" if i.is_there else "(gone)", i.volume, i.claim)
        for i in items
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())
