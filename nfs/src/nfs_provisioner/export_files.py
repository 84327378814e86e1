"""One file per export: what Ganesha reads when it starts, and our record of what is exported."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from external_storage import replace_file, sync_directory
from external_storage.logs import get_logger
from nfs_provisioner.directories import check_name
from nfs_provisioner.export_ids import LAST_ID, RESERVED_IDS

log = get_logger(__name__)

PSEUDO_ROOT = "/export"
"""Clients mount ``/export/<volume>``, wherever the exported directory is on the server."""

_SUFFIX = ".conf"
_MAX_FILE_NAME = 255
# What a quoted string of Ganesha's configuration can hold without escapes.
_QUOTABLE = re.compile(r'[^"\\\x00-\x1f\x7f]+')


class Squash(StrEnum):
    """Which users of a client are taken for the anonymous one."""

    NO_ROOT_SQUASH = "no_root_squash"
    ROOT_ID_SQUASH = "root_id_squash"
    """uid 0 and gid 0, but not their supplementary groups, which a volume's gid relies on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """One exported volume. ValueError for an id, a name or a path that cannot be exported."""

    export_id: int
    """1 to 65535, but not 152; in every file handle, so it stays the same for a volume's life."""
    name: str
    """The volume's name."""
    path: Path
    """The directory, absolute."""
    pseudo: str
    """Where clients see it."""
    squash: Squash = Squash.NO_ROOT_SQUASH

    def __post_init__(self) -> None:
        check_name(self.name)
        if not 1 <= self.export_id <= LAST_ID or self.export_id in RESERVED_IDS:
            raise ValueError(f"not a usable export id: {self.export_id}")
        for value in (str(self.path), self.pseudo):
            if not value.startswith("/") or not _QUOTABLE.fullmatch(value):
                raise ValueError(f"cannot be exported, not a plain absolute path: {value!r}")


def render(export: Export) -> str:
    """The text of the export's file; ``parse`` reads it back."""
    return f"""\
# Written by nfs-provisioner. Removed with the volume {export.name}.
EXPORT {{
    Export_Id = {export.export_id};
    Path = "{export.path}";
    Pseudo = "{export.pseudo}";
    Access_Type = RW;
    Squash = {export.squash};
    SecType = sys;
    Protocols = 4;
    Transports = TCP;
    FSAL {{ Name = VFS; }}
}}
"""


_FILE = re.compile(
    r"# Written by nfs-provisioner\. Removed with the volume (?P<name>\S+)\.\n"
    r"EXPORT \{\n"
    r" *Export_Id = (?P<export_id>\d{1,5});\n"
    r' *Path = "(?P<path>[^"\n]+)";\n'
    r' *Pseudo = "(?P<pseudo>[^"\n]+)";\n'
    r" *Access_Type = RW;\n"
    r" *Squash = (?P<squash>\w+);\n"
    r" *SecType = sys;\n *Protocols = 4;\n *Transports = TCP;\n *FSAL \{ Name = VFS; \}\n\}\n"
)


def parse(text: str) -> Export:
    """The export a file of ours describes.

    ValueError for anything else, even if Ganesha could read it: a file that was changed by hand or
    cut short must not pass for what was written. Who changes ``render`` lets this read both.
    """
    match = _FILE.fullmatch(text)
    if match is None:
        raise ValueError("not a complete export file of ours")
    return Export(
        export_id=int(match["export_id"]),
        name=match["name"],
        path=Path(match["path"]),
        pseudo=match["pseudo"],
        squash=Squash(match["squash"]),
    )


class ExportFiles:
    """The export files below ``state_dir``: ``exports.d/<volume>.conf``.

    A file appears there by one rename from ``exports.tmp``, complete and durable: Ganesha reads
    whatever is in ``exports.d``, and half a file would keep the whole server from starting.
    """

    def __init__(self, state_dir: Path) -> None:
        self.directory = state_dir / "exports.d"
        self._staging = state_dir / "exports.tmp"
        self._bad = state_dir / "exports.bad"

    def prepare(self) -> None:
        """Make the directories and remove what a killed predecessor was writing. Raises OSError."""
        for directory in (self.directory, self._staging, self._bad):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in self._staging.iterdir():
            leftover.unlink()

    def path(self, name: str) -> Path:
        """The file of the volume ``name``. ValueError for a bad name."""
        if len(file_name := check_name(name) + _SUFFIX) > _MAX_FILE_NAME:
            raise ValueError(f"volume name too long for an export file: {name[:80]!r}…")
        return self.directory / file_name

    def write(self, export: Export) -> Path:
        """Make the file hold this export, durably; its path. Raises OSError."""
        target, text = self.path(export.name), render(export)
        if not _holds(target, text):
            replace_file(target, text, staging=self._staging / target.name)
        return target

    def read(self, name: str) -> Export | None:
        """The export its file describes; None if there is no file or it cannot be read as one."""
        try:
            return parse(self.path(name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def delete(self, name: str) -> None:
        """Remove the file, durably; a missing one is fine. Raises OSError."""
        self.path(name).unlink(missing_ok=True)
        sync_directory(self.directory)

    def load(self) -> dict[str, Export]:
        """Every export by volume name.

        A file that is damaged, not ours, or repeats an id is moved to ``exports.bad`` and logged:
        left in place it could keep Ganesha from starting, and with it all other volumes down.
        Raises OSError.
        """
        exports: dict[str, Export] = {}
        owners: dict[int, str] = {}
        for file in sorted(self.directory.iterdir()):
            try:
                export = parse(file.read_text(encoding="utf-8"))
                if file.name != export.name + _SUFFIX:
                    raise ValueError(f"is the file of {export.name}")
                if (owner := owners.setdefault(export.export_id, export.name)) != export.name:
                    raise ValueError(f"has the export id {export.export_id} of {owner}")
            except FileNotFoundError as error:
                if file.is_symlink():  # else deleted just now
                    self._set_aside(file, error)
            except (ValueError, IsADirectoryError) as error:
                self._set_aside(file, error)
            else:
                exports[export.name] = export
        return exports

    def _set_aside(self, file: Path, why: Exception) -> None:
        target = self._bad / file.name
        number = 1
        while os.path.lexists(target):
            target = self._bad / f"{file.name}.{number}"
            number += 1
        file.rename(target)
        sync_directory(self.directory)
        log.error("export file set aside", file=file.name, moved_to=str(target), why=why)


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == text
    except (FileNotFoundError, UnicodeDecodeError):
        return False
