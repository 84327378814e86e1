"""Commands for people: ``doctor``, ``orphans``, ``missing``, ``install-helper``.

They read the same settings as the provisioner, and change nothing unless they are told what.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from prometheus_client import CollectorRegistry

from external_storage import (
    Deadline,
    Owner,
    PersistentVolume,
    PersistentVolumeClaim,
    Problems,
    ProvisionerError,
    volume_name,
)
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.errors import KubeError
from external_storage.kube.names import ANN_PROVISIONED_BY
from external_storage.owner import read_cluster
from iscsi_targetd_provisioner.backend import Grade
from iscsi_targetd_provisioner.fleet import Fleet, Place, build_fleet
from iscsi_targetd_provisioner.helper_session import INSTALLED_PATH
from iscsi_targetd_provisioner.host.source import helper_source
from iscsi_targetd_provisioner.observing import Observations
from iscsi_targetd_provisioner.servers import BadServers
from iscsi_targetd_provisioner.settings import IscsiTargetdSettings

_LIMIT_S = 120.0
EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2

_SHARED = (
    "provisioner_name",
    "additional_provisioner_names",
    "kubeconfig",
    "master",
    "volume_name_template",
)
_OWN = (
    "servers_file",
    "default_server",
    "targetd_scheme",
    "targetd_address",
    "targetd_port",
    "targetd_username",
    "targetd_password",
    "targetd_ca_file",
)


def run_command(argv: Sequence[str], *, default_name: str) -> NoReturn:
    """Run one of the commands; 0: all is well, 1: something was found or failed, 2: bad usage."""
    try:
        result = _group(default_name).main(args=list(argv), standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (BadServers, ProvisionerError, KubeError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(EXIT_FAILED)
    except Problems as error:
        for problem in error.problems:
            click.echo(f"error: {problem}", err=True)
        sys.exit(EXIT_USAGE)
    sys.exit(result if isinstance(result, int) else EXIT_OK)


COMMANDS = ("doctor", "orphans", "missing", "install-helper")


def _group(default_name: str) -> click.Group:
    group = click.Group(help="Looks after the storage hosts of iscsi-targetd-provisioner.")
    remove = click.Option(
        ["--remove"], multiple=True, metavar="NAME", help="Remove this one; may be given again."
    )
    for name, work, extra in (
        ("doctor", doctor, []),
        ("orphans", orphans, [remove]),
        ("missing", missing, []),
    ):
        group.add_command(_command(name, work, extra, default_name))
    group.add_command(install_helper)
    return group


def _command(
    name: str, work: Callable[..., int], extra: Sequence[click.Parameter], default_name: str
) -> click.Command:
    infos = [info for info in IscsiTargetdSettings.fields() if info.name in (*_SHARED, *_OWN)]

    def callback(**given: Any) -> int:  # noqa: ANN401
        own = {info.name: given.pop(info.name) for info in infos}
        texts = {key: value for key, value in own.items() if value is not None}
        settings = IscsiTargetdSettings.from_texts({"provisioner_name": default_name, **texts})
        observations = Observations(CollectorRegistry())
        fleet = build_fleet(settings, observations, owner=lambda: _owner(settings))
        try:
            return work(fleet, settings, **given)
        finally:
            fleet.close()

    options = [
        click.Option([info.flag], type=str, envvar=info.env, default=None, help=info.doc)
        for info in infos
    ]
    return click.Command(name, callback=callback, params=[*options, *extra], help=work.__doc__)


def doctor(fleet: Fleet, _settings: IscsiTargetdSettings) -> int:
    """Check each storage host, and say what to do."""
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


def orphans(fleet: Fleet, settings: IscsiTargetdSettings, remove: Sequence[str]) -> int:
    """List volumes on the hosts that no PersistentVolume leads to; 1 if there are any.

    On targetd, all volumes of the pools count: it cannot tell whose they are.
    """
    client = _client(settings)
    try:
        # First the hosts: what is made meanwhile has its PersistentVolume, or its claim, by then.
        there = [
            (Place(server, volume.pool), volume)
            for server in fleet.servers.values()
            for volume in server.backend.volumes(_deadline())
        ]
        known = {volume.name for volume in client.list_all(PersistentVolume)}
        begun = {_name(claim, settings) for claim in client.list_all(PersistentVolumeClaim)}
    finally:
        client.close()
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


def missing(fleet: Fleet, settings: IscsiTargetdSettings) -> int:
    """List PersistentVolumes whose volume, or whose export, is not on its host; 1 if any."""
    client = _client(settings)
    try:
        mine = [
            volume
            for volume in client.list_all(PersistentVolume)
            if volume.metadata.annotations.get(ANN_PROVISIONED_BY) in settings.names
        ]
    finally:
        client.close()
    there = {
        name: {volume.name for volume in server.backend.volumes(_deadline())}
        for name, server in fleet.servers.items()
    }
    exported = {
        name: {export.volume for export in server.backend.exports(_deadline())}
        for name, server in fleet.servers.items()
    }
    result = EXIT_OK
    for volume in sorted(mine, key=lambda volume: volume.name):
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


def _client(settings: IscsiTargetdSettings) -> Client:
    return Client(auth.load(kubeconfig=settings.kubeconfig, master=settings.master))


def _owner(settings: IscsiTargetdSettings) -> Owner:
    client = _client(settings)
    try:
        return Owner(read_cluster(client), settings.names)
    finally:
        client.close()


def _deadline() -> Deadline:
    return Deadline(time.monotonic() + _LIMIT_S)
