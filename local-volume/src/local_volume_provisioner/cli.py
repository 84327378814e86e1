"""The command ``local-volume``: what an admin types, in the agent's pod.

kubectl exec -n local-volume-provisioner POD -- local-volume list
"""

from __future__ import annotations

import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from external_storage import Problems
from local_volume_provisioner import config
from local_volume_provisioner.board import Entry, Status
from local_volume_provisioner.requests import Request, Requests, Wish
from local_volume_provisioner.states import State

_TIMEOUT_S = 10.0
_POLL_S = 1.0
_STUCK = (State.IDENTITY_MISMATCH, State.MISSING, State.DUPLICATE, State.RELEASED, State.DIRTY)
_AT_WORK = (State.CLEANING, State.CLEANED, State.OFFERING)

endpoint_option = click.option(
    "--endpoint",
    default="http://127.0.0.1:8080",
    show_default=True,
    envvar="LOCAL_VOLUME_ENDPOINT",
    help="Where the agent of this node answers.",
)
state_option = click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=Path("/var/lib/local-volume-provisioner"),
    show_default=True,
    envvar="STATE_DIR",
    help="The agent's state directory.",
)
output_option = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Looks at the disks of this node, and asks its agent to do something about one."""


@cli.command("list")
@endpoint_option
@output_option
def list_(endpoint: str, output: str) -> None:
    """All entries, their volumes and states."""
    status = _status(endpoint)
    if output == "json":
        _print_json(status)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("PATH", "CLASS", "VOLUME", "STATE", "SIZE", "CLAIM", "REASON"):
        table.add_column(head, overflow="fold")
    for entry in status.entries:
        state = entry.state.value
        if entry.state is State.CLEANING and entry.progress:
            state += f" {entry.progress:.0%}"
        table.add_row(
            entry.path, entry.class_name, entry.volume, state, _size(entry.size), entry.claim,
            entry.reason,
        )  # fmt: skip
    # A pipe has no width of its own: a line for each entry, however long.
    Console(width=None if sys.stdout.isatty() else 400).print(table)
    for name, text in status.class_problems.items():
        click.echo(f"class {name}: {text}")
    for problem in status.config_problems:
        click.echo(f"the new configuration is refused: {problem}")
    if status.brake:
        click.echo(f"brake: {status.brake}")


@cli.command()
@click.argument("target")
@endpoint_option
@output_option
def explain(target: str, endpoint: str, output: str) -> None:
    """All that is known about one PATH or volume, and why it is as it is."""
    entry = _find(_status(endpoint), target)
    if output == "json":
        _print_json(entry)
        return
    for name, value in msgspec.to_builtins(entry).items():
        shown = (
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        )
        click.echo(f"{name + ':':12} {_size(value) if name == 'size' else shown}")


@cli.command()
@click.argument("target")
@click.option("--wait", is_flag=True, help="Show a bar until it is clean.")
@endpoint_option
@state_option
def clean(target: str, wait: bool, endpoint: str, state_dir: Path) -> None:
    """Clean what waits for approval: cleanPolicy manual, the brake, failures, weak identity.

    What is in use, bound, or another disk than was written down is never cleaned.
    """
    entry = _ask(endpoint, state_dir, Wish.CLEAN, target)
    if wait:
        _follow(endpoint, state_dir, entry.path)


@cli.command()
@click.argument("target")
@endpoint_option
@state_option
def offer(target: str, endpoint: str, state_dir: Path) -> None:
    """Take what is there as new and offer it AS IT IS, with whatever data is on it.

    Also puts back into service what was retired.
    """
    _ask(endpoint, state_dir, Wish.OFFER, target)


@cli.command()
@click.argument("target")
@endpoint_option
@state_option
def retire(target: str, endpoint: str, state_dir: Path) -> None:
    """Take a disk out of service: a free volume at once, one in use when it is cleaned."""
    _ask(endpoint, state_dir, Wish.RETIRE, target)


@cli.command("check-config")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
def check_config(directory: Path) -> None:
    """Check a directory of files, one for each key of the ConfigMap; exit code 2 if it is bad."""
    try:
        found = config.read_directory(directory)
    except Problems as error:
        for problem in error.problems:
            click.echo(f"error: {problem}", err=True)
        sys.exit(2)
    for kind in found.classes.values():
        click.echo(f"class {kind.name}: {kind.host_dir}, {kind.mode}")
        click.echo(f"  disks are cleaned by: {kind.method} ({kind.clean_policy})")
        click.echo(f"  afterwards: {kind.method.leaves}")


def _ask(endpoint: str, state_dir: Path, wish: Wish, target: str) -> Entry:
    """Leave a request for the agent, about something that it knows."""
    entry = _find(_status(endpoint), target)
    try:
        requests = Requests(state_dir)
        requests.prepare()
        requests.add(Request(wish, entry.path, uid=entry.uid, disk=entry.disk))
    except OSError as error:
        raise click.ClickException(f"{state_dir}: {error.strerror}") from error
    click.echo(f"{wish} {entry.path}: asked for (it is {entry.state})")
    return entry


def _follow(endpoint: str, state_dir: Path, path: str) -> None:
    """Until the request has been met, or is one that cannot be."""
    requests, request = Requests(state_dir), Request(Wish.CLEAN, path)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task(path, total=1.0)
        while True:
            is_open = requests.is_open(request)
            entry = _find(_status(endpoint), path)
            bar.update(task, completed=entry.progress, description=f"{path} {entry.state}")
            if entry.state not in _AT_WORK and (not is_open or entry.state in _STUCK):
                break
            time.sleep(_POLL_S)
    click.echo(f"{path}: {entry.state} {entry.reason}")


def _status(endpoint: str) -> Status:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{endpoint}/volumes", timeout=_TIMEOUT_S) as answer:
            return msgspec.json.decode(answer.read(), type=Status)
    except (OSError, urllib.error.URLError, msgspec.DecodeError) as error:
        raise click.ClickException(f"the agent at {endpoint} does not answer: {error}") from error


def _find(status: Status, target: str) -> Entry:
    for entry in status.entries:
        if target in (entry.path, entry.volume):
            return entry
    raise click.ClickException(f"{target}: neither a path nor a volume of this node")


def _print_json(value: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value)).decode())


def _size(count: Any) -> str:  # noqa: ANN401
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B" if count else ""


def main() -> NoReturn:
    """The entry point."""
    run: Callable[[], object] = cli
    run()
    sys.exit(0)


if __name__ == "__main__":
    main()
