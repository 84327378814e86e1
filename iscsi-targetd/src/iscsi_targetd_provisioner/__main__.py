"""The command ``iscsi-targetd-provisioner``."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping, Sequence
from typing import NoReturn

from external_storage import run
from iscsi_targetd_provisioner.cli import COMMANDS
from iscsi_targetd_provisioner.node_agent import NodeAgent
from iscsi_targetd_provisioner.provisioner import IscsiTargetdProvisioner

DEFAULT_NAME = "iscsi-targetd"
"""The original's: its classes go on working."""

# Of the original, where they had no effect either.
_IGNORED = (
    "--resync-period",
    "--exponential-backoff-on-error",
    "--fail-retry-threshold",
    "--lease-period",
    "--renew-deadline",
    "--retry-period",
)

# The original's words for how much is logged, beside those that are ours too.
_LEVELS = {"trace": "debug", "warn": "warning", "fatal": "error", "panic": "error"}
_LEVEL_FLAG = "--log-level"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run until SIGTERM, or run one command: ``node-agent``, ``doctor``, ``orphans`` ..."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] == "node-agent":
        run(NodeAgent, name="iscsi-targetd-node-agent", argv=arguments[1:])
    if arguments and arguments[0] == "start":
        # The original's only command.
        arguments = arguments[1:]
    _translate_level(os.environ)
    if not arguments or arguments[0] not in COMMANDS:
        arguments = _without_ignored(arguments)
    run(IscsiTargetdProvisioner, name=DEFAULT_NAME, argv=arguments, commands=COMMANDS)


def _translate_level(environment: MutableMapping[str, str]) -> None:
    level = environment.get("LOG_LEVEL", "").lower()
    if level in _LEVELS:
        environment["LOG_LEVEL"] = _LEVELS[level]


def _without_ignored(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if skip:
            skip = False
        elif name in _IGNORED:
            sys.stderr.write(f"warning: {name} has no effect\n")
            # A switch takes its value after "=" only.
            skip = not equals and name != "--exponential-backoff-on-error"
        elif name == _LEVEL_FLAG and equals:
            kept.append(f"{name}={_LEVELS.get(value.lower(), value)}")
        elif kept and kept[-1] == _LEVEL_FLAG:
            kept.append(_LEVELS.get(argument.lower(), argument))
        else:
            kept.append(argument)
    return kept


if __name__ == "__main__":
    main()
