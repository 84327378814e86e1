"""``run()``: from the command line to a running provisioner, and to its exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn, Self

import click
from prometheus_client import disable_created_metrics

from external_storage import cli, logs
from external_storage.agent import Agent
from external_storage.cli import EXIT_FAILED, EXIT_OK, Commands
from external_storage.errors import CannotStart
from external_storage.fields import Problems
from external_storage.kube import auth
from external_storage.kube.errors import ConfigError
from external_storage.logs import get_logger
from external_storage.manager import Manager
from external_storage.provisioner import Provisioner
from external_storage.settings import ProgramSettings, Settings

log = get_logger(__name__)

Program = type[Provisioner[Any, Any]] | type[Agent[Any]]


def run(
    program_type: Program,
    *,
    name: str,
    argv: Sequence[str] | None = None,
    commands: Commands | None = None,
) -> NoReturn:
    """Run a provisioner or an agent until SIGTERM or SIGINT, then drain its work and exit.

    Args:
        program_type: the author's class; its settings become flags and environment variables.
        name: the provisioner name, unless ``--provisioner-name`` gives another one; the name of an
            agent.
        argv: arguments without the program's name; the process's own by default.
        commands: run in place of all this when their name is the first argument.

    Exit codes: 0 after a clean stop, 1 when something failed, 2 when settings are wrong (all of
    what is wrong is listed).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    prog_name = None
    word = arguments[0] if arguments else ""
    command = cli.find(commands or {}, word, program_type.settings_type, name=name)
    if command is not None:
        arguments.pop(0)
        prog_name = cli.program_name(word)
    else:
        command = build_command(program_type, name=name, commands=commands)
    try:
        result = command.main(args=arguments, prog_name=prog_name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(EXIT_FAILED)
    sys.exit(result if isinstance(result, int) else EXIT_OK)


def build_command(
    program_type: Program, *, name: str, commands: Commands | None = None
) -> click.Command:
    """The click command of a program; its options are the fields of its settings."""
    settings_type = program_type.settings_type

    @click.pass_context
    def callback(context: click.Context, /, **given: str | None) -> int:
        try:
            settings: Any = cli.read_settings(settings_type, context, given, name=name)
        except Problems as error:
            return cli.refuse(error)
        logs.configure(level=settings.log_level, format=settings.log_format)
        if issubclass(program_type, Agent):
            return serve_agent(program_type, settings, name)
        return serve(program_type, settings)

    epilog = ["In brackets: the environment variable and the default.", cli.listed(commands or {})]
    return click.Command(
        name=None,
        callback=callback,
        params=cli.settings_options(settings_type, name=name),
        help=program_type.__doc__,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="\n\n".join(text for text in epilog if text),
    )


def serve(provisioner_type: type[Provisioner[Any, Any]], settings: Settings) -> int:
    """Run with checked settings until a signal comes; returns the exit code."""
    return _serve(
        lambda config: Manager.for_provisioner(provisioner_type, settings, config),
        settings,
        name=settings.provisioner_name,
    )


def serve_agent(agent_type: type[Agent[Any]], settings: ProgramSettings, name: str) -> int:
    """As ``serve``."""
    return _serve(
        lambda config: Manager.for_agent(agent_type, settings, config, name), settings, name=name
    )


def _serve(
    build: Callable[[auth.ClientConfig], Manager], settings: ProgramSettings, *, name: str
) -> int:
    # One more series for each counter and bucket, which nobody looks at.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    with _Signals() as signals:
        try:
            config = auth.load(kubeconfig=settings.kubeconfig, master=settings.master)
            manager = build(config)
            log.info("starting", provisioner=name, server=config.server)
            manager.start()
        except (CannotStart, ConfigError, OSError) as error:
            log.error("cannot start", error=str(error))
            return EXIT_FAILED
        except Exception:
            log.exception("cannot start")
            return EXIT_FAILED
        signals.wait()
        log.info("stopping")
        clean = manager.stop()
    log.info("stopped", clean=clean)
    return EXIT_OK if clean else EXIT_FAILED


class _Signals:
    """Waits for SIGTERM or SIGINT; a second SIGINT, a person's impatience, ends it at once.

    Through a wakeup descriptor, which any thread that the kernel gives the signal to writes to: an
    Event set by a Python handler needs the main thread to run, and could block on its own lock.
    The handlers stay when it is over: until its end, the process is not to be killed by a signal
    that comes twice.
    """

    def __init__(self) -> None:
        self._interrupted = False

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_exc: object) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._read)
        os.close(self._write)

    def wait(self) -> None:
        os.read(self._read, 1)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                os._exit(128 + number)
            self._interrupted = True
