"""The operator's commands: ``doctor``, ``orphans``, ``missing``, ``install-helper``.

They read the same settings as the provisioner, and change nothing unless they are told what. Exit
codes: 0: all is well, 1: something was found or failed, 2: bad usage.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click
from prometheus_client import CollectorRegistry

from external_storage import (
    Deadline,
    Owner,
    PersistentVolume,
    PersistentVolumeClaim,
    ProvisionerError,
    volume_name,
)
from external_storage.cli import EXIT_FAILED, EXIT_OK, Command, Commands, connected
from external_storage.owner import read_cluster
from external_storage.persistent_volume import is_ours
from iscsi_targetd_provisioner.backend import Grade
from iscsi_targetd_provisioner.fleet import Fleet, Place, build_fleet
from iscsi_targetd_provisioner.helper_session import INSTALLED_PATH
from iscsi_targetd_provisioner.host.source import helper_source
from iscsi_targetd_provisioner.observing import Observations
from iscsi_targetd_provisioner.settings import IscsiTargetdSettings

_LIMIT_S: Final = 120.0


def _doctor(settings: IscsiTargetdSettings) -> int:
    with _fleet(settings) as fleet:
        return _examine(fleet)


def _examine(fleet: Fleet) -> int:
    worst = EXIT_OK
    for name, server in fleet.servers.items():
        click.echo(f"server {name}")
        if not server.portals:
            click.echo("  [warning] no portals: each class has to give its targetPortal")
        for finding in server.backend.check(_deadline()):
            click.echo(f"  [{finding.grade.value}] {finding.text}")
            if finding.advice:
                click.echo(f"      do: {finding.advice}")
            if finding.grade is Grade.BAD:
                worst = EXIT_FAILED
    return worst


def _orphans(settings: IscsiTargetdSettings, remove: Sequence[str]) -> int:
    with _fleet(settings) as fleet, connected(settings) as client:
        # First the hosts: what is made meanwhile has its PersistentVolume, or its claim, by then.
        there = [
            (Place(server, volume.pool), volume)
            for server in fleet.servers.values()
            for volume in server.backend.volumes(_deadline())
        ]
        known = {volume.name for volume in client.list_all(PersistentVolume)}
        begun = {_name(claim, settings) for claim in client.list_all(PersistentVolumeClaim)}
        found = {v.name: (place, v) for place, v in there if v.name not in known | begun}
        unknown = [name for name in remove if name not in found]
        if unknown:
            raise click.UsageError(f"{unknown[0]} is not an orphan: nothing is removed")
        for name, (place, volume) in sorted(found.items()):
            click.echo(f"{place.server.name}\t{place.pool}\t{name}\t{volume.size}")
            if name in remove:
                backend = place.server.backend
                backend.unexport(place.pool, name, deadline=_deadline())
                backend.destroy(place.pool, name, deadline=_deadline())
                click.echo(f"removed {name}")
    return EXIT_FAILED if set(found) - set(remove) else EXIT_OK


def _missing(settings: IscsiTargetdSettings) -> int:
    with _fleet(settings) as fleet, connected(settings) as client:
        volumes = [v for v in client.list_all(PersistentVolume) if is_ours(v, settings.names)]
        there = {
            name: {volume.name for volume in server.backend.volumes(_deadline())}
            for name, server in fleet.servers.items()
        }
        exported = {
            name: {export.volume for export in server.backend.exports(_deadline())}
            for name, server in fleet.servers.items()
        }
    result = EXIT_OK
    for volume in sorted(volumes, key=lambda volume: volume.name):
        try:
            server = fleet.place_of(volume).server.name
        except ProvisionerError as error:
            what = str(error)
        else:
            if volume.name in there[server] & exported[server]:
                continue
            what = "not exported" if volume.name in there[server] else "no volume"
        result = EXIT_FAILED
        click.echo(f"{volume.name}\t{what}")
    return result


@click.command("install-helper")
@click.option("--output", type=click.Path(path_type=Path), help="Where to write the helper's text.")
@click.option("--user", default="root", help="User that the provisioner logs in as.")
@click.option("--key", default="KEY", help="Its public key, as in authorized_keys.")
@click.option("--pool", multiple=True, help="Pool that may be used; may be given again.")
def install_helper(output: Path | None, user: str, key: str, pool: Sequence[str]) -> int:
    """Write the helper for a storage host, and the lines that let a key run it and nothing else."""
    pools = "".join(f" --pool {name}" for name in pool)
    run = f"{INSTALLED_PATH}{pools}"
    command = run if user == "root" else f"sudo -n -- {run}"
    if output is None:
        click.echo(helper_source(), nl=False)
        return EXIT_OK
    output.write_text(helper_source(), encoding="utf-8")
    output.chmod(0o755)
    click.echo(f"# Put {output} on the host, owned by root, mode 0755, as {INSTALLED_PATH}")
    click.echo(f"# In ~{user}/.ssh/authorized_keys:")
    click.echo(f'command="{command}",restrict {key}')
    if user != "root":
        click.echo("# In /etc/sudoers.d/external-storage:")
        click.echo(f"{user} ALL=(root) NOPASSWD: {run}")
    click.echo("# In the configuration of servers: helper: installed")
    return EXIT_OK


COMMANDS: Final[Commands] = {
    "doctor": Command("Check each storage host, and say what to do.", _doctor),
    "orphans": Command(
        "List volumes on the hosts that no PersistentVolume leads to.\n\n"
        "On targetd, all volumes of the pools count: it cannot tell whose they are.",
        _orphans,
        options=[
            click.Option(
                ["--remove"],
                multiple=True,
                metavar="NAME",
                help="Remove this one; may be given again.",
            )
        ],
    ),
    "missing": Command(
        "List PersistentVolumes whose volume, or whose export, is not on its host.", _missing
    ),
    "install-helper": install_helper,
}


@contextmanager
def _fleet(settings: IscsiTargetdSettings) -> Iterator[Fleet]:
    observations = Observations(CollectorRegistry())
    fleet = build_fleet(settings, observations, owner=lambda: _owner(settings))
    try:
        yield fleet
    finally:
        fleet.close()


def _owner(settings: IscsiTargetdSettings) -> Owner:
    with connected(settings) as client:
        return Owner(read_cluster(client), settings.names)


def _name(claim: PersistentVolumeClaim, settings: IscsiTargetdSettings) -> str:
    """What a volume for the claim is, or would be, called."""
    try:
        return volume_name.render(
            settings.volume_name_template,
            namespace=claim.namespace,
            name=claim.name,
            uid=claim.uid,
        )
    except volume_name.BadVolumeName:
        return ""


def _deadline() -> Deadline:
    return Deadline(time.monotonic() + _LIMIT_S)
