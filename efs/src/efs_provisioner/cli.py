"""The operator's commands: ``doctor``, ``orphans`` and ``missing``, run beside the provisioner.

They take the provisioner's own settings (``kubectl exec deploy/efs-provisioner --
/opt/efs-provisioner/bin/efs-provisioner doctor`` has them from the environment, but for those that
are flags in the manifest), change nothing unless told, and end with exit code 1 if there is, or
remains, something to look at.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

import click

from efs_provisioner.doctor import Finding, examine
from efs_provisioner.inventory import Inventory, Item
from efs_provisioner.provisioner import EfsProvisioner
from efs_provisioner.settings import EfsSettings
from external_storage import Problems, ProvisionerError
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.errors import ConfigError, KubeError
from external_storage.main import EXIT_FAILED, EXIT_OK, EXIT_USAGE, build_command

_AGENT: Final = "external-storage-efs-cli"
_MARKS: Final = {True: "ok", False: "FAILED", None: "-"}


@dataclass(frozen=True, slots=True)
class _Command:
    text: str
    act: Callable[[EfsSettings, Client, bool], int]
    option: tuple[str, str] = ("", "")
    """A switch of its own, and what it does."""


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
    command = _COMMANDS[which]

    def callback(**given: str | bool | None) -> int:
        switch = bool(given.pop("switch", False))
        texts = {"provisioner_name": name}
        texts |= {key: str(value) for key, value in given.items() if value is not None}
        try:
            settings = EfsSettings.from_texts(texts)
        except Problems as error:
            for problem in error.problems:
                click.echo(f"error: {problem}", err=True)
            return EXIT_USAGE
        return _with_client(settings, command, switch)

    options: list[click.Parameter] = list(build_command(EfsProvisioner, name=name).params)
    if command.option[0]:
        options.append(
            click.Option([command.option[0], "switch"], is_flag=True, help=command.option[1])
        )
    return click.Command(which, callback=callback, params=options, help=command.text)


def _with_client(settings: EfsSettings, command: _Command, switch: bool) -> int:
    try:
        config = auth.load(kubeconfig=settings.kubeconfig, master=settings.master)
        client = Client(config, user_agent=_AGENT)
        try:
            return command.act(settings, client, switch)
        finally:
            client.close()
    except (ConfigError, KubeError, ProvisionerError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        return EXIT_FAILED


# -- what they do


def _doctor(settings: EfsSettings, client: Client, writes: bool) -> int:
    findings = list(examine(settings, client, writes=writes))
    _print(("", "what", "found"), [_row(finding) for finding in findings])
    return EXIT_FAILED if any(finding.good is False for finding in findings) else EXIT_OK


def _row(finding: Finding) -> tuple[str, str, str]:
    return _MARKS[finding.good], finding.what, finding.text


def _orphans(settings: EfsSettings, client: Client, delete: bool) -> int:
    with Inventory(settings, client) as inventory:
        found = inventory.orphans()
        _print_items(found, "no volume leads to these")
        if not delete:
            return EXIT_FAILED if found else EXIT_OK
        kept = 0
        for item in found:
            try:
                inventory.remove(item)
            except (KubeError, ProvisionerError) as error:
                kept += 1
                click.echo(f"{item.name}: not deleted: {error}")
            else:
                click.echo(f"{item.name}: deleted; the directory {item.path} is kept")
    return EXIT_FAILED if kept else EXIT_OK


def _missing(settings: EfsSettings, client: Client, _: bool) -> int:
    with Inventory(settings, client) as inventory:
        found = inventory.missing()
    _print_items(found, "these volumes lead to nothing")
    return EXIT_FAILED if found else EXIT_OK


def _print_items(items: Sequence[Item], what: str) -> None:
    if not items:
        click.echo("nothing found")
        return
    click.echo(f"{what}:")
    heads = ("file system", "what", "volume", "path")
    _print(heads, [(item.file_system, item.name, item.volume, item.path) for item in items])


def _print(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in plain columns: it is read by grep as well as by people."""
    lines = [tuple(heads), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


_COMMANDS: Final = {
    "doctor": _Command(
        "Look at all that the provisioner needs, and say what is missing.",
        _doctor,
        ("--write", "Make an access point and delete it, to try those permissions, too."),
    ),
    "orphans": _Command(
        "List what has been made and has no volume any more.",
        _orphans,
        ("--delete", "Delete the access points among them; directories are never deleted."),
    ),
    "missing": _Command("List volumes whose access point or directory is gone.", _missing),
}
