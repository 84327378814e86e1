"""The operator's commands: ``doctor``, ``orphans`` and ``missing``, run beside the provisioner.

They take the provisioner's own settings (``kubectl exec deploy/efs-provisioner --
/opt/efs-provisioner/bin/efs-provisioner doctor`` has them from the environment, but for those that
are flags in the manifest), change nothing unless told, and end with exit code 1 if there is, or
remains, something to look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import click

from efs_provisioner.doctor import Finding, examine
from efs_provisioner.inventory import Item, opened
from efs_provisioner.settings import EfsSettings
from external_storage import ProvisionerError
from external_storage.cli import (
    EXIT_FAILED,
    EXIT_OK,
    Command,
    Commands,
    connected,
    print_found,
    print_table,
)
from external_storage.kube.errors import KubeError

_MARKS: Final = {True: "ok", False: "FAILED", None: "-"}


def _doctor(settings: EfsSettings, write: bool) -> int:
    with connected(settings) as client:
        findings = list(examine(settings, client, writes=write))
    print_table(("", "what", "found"), [_row(finding) for finding in findings])
    return EXIT_FAILED if any(finding.good is False for finding in findings) else EXIT_OK


def _row(finding: Finding) -> tuple[str, str, str]:
    return _MARKS[finding.good], finding.what, finding.text


def _orphans(settings: EfsSettings, delete: bool) -> int:
    with connected(settings) as client, opened(settings, client) as inventory:
        found = inventory.orphans()
        code = _print(found, "no volume leads to these")
        if not delete:
            return code
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


def _missing(settings: EfsSettings) -> int:
    with connected(settings) as client, opened(settings, client) as inventory:
        found = inventory.missing()
    return _print(found, "these volumes lead to nothing")


COMMANDS: Final[Commands] = {
    "doctor": Command(
        "Look at all that the provisioner needs, and say what is missing.",
        _doctor,
        options=[
            click.Option(
                ["--write"],
                is_flag=True,
                help="Make an access point and delete it, to try those permissions, too.",
            )
        ],
    ),
    "orphans": Command(
        "List what has been made and has no volume any more.",
        _orphans,
        options=[
            click.Option(
                ["--delete"],
                is_flag=True,
                help="Delete the access points among them; directories are never deleted.",
            )
        ],
    ),
    "missing": Command("List volumes whose access point or directory is gone.", _missing),
}


def _print(items: Sequence[Item], what: str) -> int:
    rows = [(item.file_system, item.name, item.volume, item.path) for item in items]
    return print_found(what, ("file system", "what", "volume", "path"), rows)
