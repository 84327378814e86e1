"""Logging: a constant message plus fields, as text for people or JSON for machines.

A log line never has its facts woven into the message: ``log.info("volume saved", volume=name)``.
The message can then be searched for, and the fields can be filtered by. ``bind()`` gives a logger
that carries fields along, so that every line of one attempt names its claim and volume.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from enum import StrEnum
from typing import IO


class LogFormat(StrEnum):
    """How log lines are written."""

    TEXT = "text"
    JSON = "json"


class Logger:
    """A named logger whose methods take a constant message and keyword fields."""

    __slots__ = ("_fields", "_logger")

    def __init__(self, name: str, fields: Mapping[str, object] | None = None) -> None:
        self._logger = logging.getLogger(name)
        self._fields = dict(fields or {})

    def bind(self, **fields: object) -> Logger:
        """A logger that adds ``fields`` to each of its lines."""
        return Logger(self._logger.name, {**self._fields, **fields})

    def debug(self, message: str, **fields: object) -> None:
        self._write(logging.DEBUG, message, fields)

    def info(self, message: str, **fields: object) -> None:
        self._write(logging.INFO, message, fields)

    def warning(self, message: str, **fields: object) -> None:
        self._write(logging.WARNING, message, fields)

    def error(self, message: str, **fields: object) -> None:
        self._write(logging.ERROR, message, fields)

    def exception(
        self, message: str, *, exc: BaseException | None = None, **fields: object
    ) -> None:
        """An error line with the traceback of ``exc``, by default the one being handled."""
        self._write(logging.ERROR, message, fields, exc_info=exc or True)

    def _write(
        self,
        level: int,
        message: str,
        fields: Mapping[str, object],
        *,
        exc_info: BaseException | bool = False,
    ) -> None:
        if self._logger.isEnabledFor(level):
            merged = {**self._fields, **fields} if self._fields else fields
            self._logger.log(level, message, extra={"fields": merged}, exc_info=exc_info)


def get_logger(name: str) -> Logger:
    """The logger of a module: ``log = get_logger(__name__)``."""
    return Logger(name)


def configure(
    *, level: str = "info", format: LogFormat = LogFormat.TEXT, stream: IO[str] | None = None
) -> None:
    """Send everything logged in this process to ``stream`` (standard error) in one format."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonFormatter() if format is LogFormat.JSON else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("urllib3", "kubernetes"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _timestamp(created: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created))
    return f"{whole}.{int(created % 1 * 1000):03d}Z"


def _fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, Mapping) else {}


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        parts = [_timestamp(record.created), record.levelname, record.name, record.getMessage()]
        parts += [f"{key}={_quoted(value)}" for key, value in _fields_of(record).items()]
        line = " ".join(parts)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _quoted(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and not any(c in text for c in ' "=')
    return text if plain and text else json.dumps(text)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        for key, value in _fields_of(record).items():
            # A field must not take the place of what every line has.
            line[f"{key}_" if key in line else key] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
