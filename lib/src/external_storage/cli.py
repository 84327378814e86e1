"""Commands of a program for its operator: ``doctor``, ``orphans``, ``missing`` and such.

They are run beside the program, mostly by ``kubectl exec``, and take its settings: those of the
environment they share with it; what the manifest gives as flags has to be given again. A command
changes nothing unless it is told to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Concatenate, Final, Generic, TypeVar

import click
from click.core import ParameterSource

from external_storage.errors import ProvisionerError
from external_storage.fields import FieldInfo, Problems
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.errors import ConfigError, KubeError
from external_storage.settings import ProgramSettings, Settings

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2

S = TypeVar("S", bound=ProgramSettings)

_AGENT: Final = "external-storage-cli"


@dataclass(frozen=True, slots=True)
class Command(Generic[S]):
    """One command; ``run(..., commands={"orphans": Command(...)})`` makes it one of a program's."""

    text: str
    """What it does, for ``--help``; the first line also for the help of the program."""
    act: Callable[Concatenate[S, ...], int]
    """Called with the settings, and each of ``options`` by name; returns the exit code: 0, or 1 if
    there is something to look at. ``ConfigError``, ``KubeError``, ``ProvisionerError`` and
    ``OSError`` end the command as an error that is told, ``Problems`` as a wrong use."""
    options: Sequence[click.Parameter] = ()
    """What it takes beside the settings."""

    def build(self, settings_type: type[S], *, name: str) -> click.Command:
        """The click command; ``name``: the provisioner name that no setting has changed."""

        @click.pass_context
        def callback(context: click.Context, /, **given: Any) -> int:  # noqa: ANN401
            own = {option.name: given.pop(str(option.name)) for option in self.options}
            try:
                settings = read_settings(settings_type, context, given, name=name)
                return self.act(settings, **own)
            except Problems as error:
                return refuse(error)
            except (ConfigError, KubeError, ProvisionerError, OSError) as error:
                click.echo(f"error: {error}", err=True)
                return EXIT_FAILED

        return click.Command(
            name=None,
            callback=callback,
            params=[*self.options, *settings_options(settings_type, name=name)],
            help=self.text,
            context_settings={"help_option_names": ["-h", "--help"]},
        )


@contextmanager
def connected(settings: ProgramSettings) -> Iterator[Client]:
    """A client of the API server, for the time of a command; raises ``ConfigError``."""
    config = auth.load(kubeconfig=settings.kubeconfig, master=settings.master)
    client = Client(config, user_agent=_AGENT)
    try:
        yield client
    finally:
        client.close()


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """In plain columns: it is read by grep as well as by people."""
    lines = [tuple(heads), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def print_found(what: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """The table of what a command has found, below ``what`` it is; the exit code that says so."""
    if not rows:
        click.echo("nothing found")
        return EXIT_OK
    click.echo(f"{what}:")
    print_table(heads, rows)
    return EXIT_FAILED


Commands = Mapping[str, Command[Any] | click.Command]
"""By name; one that needs no settings is a click command."""


def find(
    commands: Commands, word: str, settings_type: type[ProgramSettings], *, name: str
) -> click.Command | None:
    """The command with this name; None: there is none."""
    found = commands.get(word)
    return found.build(settings_type, name=name) if isinstance(found, Command) else found


def listed(commands: Commands) -> str:
    """The commands of a program for its help; empty if it has none."""
    if not commands:
        return ""
    lines = [
        f"  {word}: {command.get_short_help_str(200)}"
        if isinstance(command, click.Command)
        else f"  {word}: {command.text.splitlines()[0]}"
        for word, command in commands.items()
    ]
    # \b: click leaves these lines as they are.
    return "\n".join(["\b", "In the place of all this a command, with its own --help:", *lines])


def program_name(word: str) -> str:
    """How a command is called, for its usage."""
    return f"{Path(sys.argv[0]).name} {word}"


# -- settings as options


def settings_options(settings_type: type[ProgramSettings], *, name: str) -> list[click.Parameter]:
    """An option for each field of the settings."""
    return [_option(info, name) for info in settings_type.fields()]


def read_settings(
    settings_type: type[S], context: click.Context, given: Mapping[str, str | None], *, name: str
) -> S:
    """The settings of what was given to ``settings_options``; ``Problems`` tells all that is wrong.

    ``name``: the provisioner name unless one is given.
    """
    texts = {"provisioner_name": name} if issubclass(settings_type, Settings) else {}
    texts |= {key: value for key, value in given.items() if value is not None}
    from_environment = {
        info.name: info.env
        for info in settings_type.fields()
        if context.get_parameter_source(info.name) is ParameterSource.ENVIRONMENT
    }
    return settings_type.from_texts(texts, called=from_environment)


def refuse(problems: Problems) -> int:
    """Tell what is wrong with the settings; the exit code."""
    for problem in problems.problems:
        click.echo(f"error: {problem}", err=True)
    return EXIT_USAGE


def _option(info: FieldInfo, name: str) -> click.Option:
    # Every option is taken as text: the settings convert them all and report all problems at once.
    default = name if info.name == "provisioner_name" else info.default_text
    return click.Option(
        [info.flag],
        type=str,
        envvar=info.env,
        default=None,
        help=f"{info.doc}  [{info.env}; {default or 'none'}]",
        metavar=_metavar(info),
    )


def _metavar(info: FieldInfo) -> str:
    if isinstance(info.type, type) and issubclass(info.type, Enum):
        return "|".join(str(member.value) for member in info.type)
    return str(getattr(info.type, "__name__", "TEXT")).upper()
