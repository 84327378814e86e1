"""What is exported: the files Ganesha reads at its start and the live exports, kept the same.

The file is the truth. It is there before the live export appears and gone before that disappears,
so that whatever is killed in between, the next start of Ganesha or the next ``reconcile`` ends
where the last call wanted to be.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from external_storage.logs import get_logger
from nfs_provisioner.export_files import PSEUDO_ROOT, Export, ExportFiles, Squash
from nfs_provisioner.export_ids import ExportIds
from nfs_provisioner.exportmgr import ExportManager, ExportRejected

__all__ = [
    "PSEUDO_ROOT",
    "Export",
    "ExportFiles",
    "ExportIds",
    "Exports",
    "ReconcileReport",
    "Squash",
]

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcileReport:
    """What ``Exports.reconcile`` found and did; names are volume names, in order."""

    files: int
    """How many exports there should be."""
    added: tuple[str, ...]
    """Were not live and are now."""
    removed: tuple[str, ...]
    """Directories that were live without a file, or under an id that is another volume's."""
    missing: tuple[str, ...]
    """Have a file and no directory, and so are not served."""
    failed: tuple[str, ...]
    """Ganesha refused them; the log says why."""

    @property
    def clean(self) -> bool:
        """Whether files and live exports were the same to begin with."""
        return not (self.added or self.removed or self.missing or self.failed)


class Exports:
    """The exports of the volumes below ``root``. Thread-safe; one call works at a time."""

    def __init__(
        self, root: Path, *, files: ExportFiles, manager: ExportManager, ids: ExportIds
    ) -> None:
        self._root = root
        self._files = files
        self._manager = manager
        self._ids = ids
        self._lock = threading.Lock()

    def describe(
        self, name: str, export_id: int, *, squash: Squash = Squash.NO_ROOT_SQUASH
    ) -> Export:
        """The export of the volume ``name``: the directory of that name below the root, seen by
        clients as ``/export/<name>``. ValueError for a bad name or id."""
        return Export(
            export_id=export_id,
            name=name,
            path=self._root / name,
            pseudo=f"{PSEUDO_ROOT}/{name}",
            squash=squash,
        )

    def publish(self, export: Export) -> None:
        """Export a volume, now and at each later start of Ganesha. Can be called again.

        Raises ValueError if the id is another volume's; BusUnavailable or Busy when the file is
        there but not yet live (call again, or ``withdraw``); ExportRejected when Ganesha refuses
        it, and then nothing is left but the id.
        """
        self._ids.claim(export.name, export.export_id)
        if not export.path.is_dir():  # Ganesha only says "block validation errors"
            raise ExportRejected(f"{export.path} is not a directory")
        with self._lock:
            before = self._files.read(export.name)
            file = self._files.write(export)
            if before is not None and before != export:
                # A live export keeps the options it was added with.
                self._manager.remove(export.export_id)
            try:
                self._manager.add(file, export.export_id, path=export.path)
            except ExportRejected:
                self._files.delete(export.name)
                raise

    def withdraw(self, name: str, export_id: int) -> None:
        """End the export of a volume, now and for later starts. Can be called again, also when
        Ganesha or we never knew it.

        A live export under the id that serves another directory is left alone. The id stays the
        volume's: free it (``ExportIds.release``) once nothing durable names it any more. Raises
        BusUnavailable, Busy or ExportRejected when the file is gone but the export may be live:
        call again.
        """
        with self._lock:
            self._files.delete(name)
            live = self._manager.path_of(export_id)
            if live == str(self._root / name):
                self._manager.remove(export_id)
            elif live is not None:
                log.warning(
                    "live export left alone, it is another directory's",
                    volume=name,
                    export_id=export_id,
                    path=live,
                )

    def reconcile(self) -> ReconcileReport:
        """Make the live exports what the files say.

        One that Ganesha refuses or that has no directory does not stop the others. Raises
        BusUnavailable or Busy (call again), OSError for the files.
        """
        with self._lock:
            wanted = self._files.load()
            paths = {export.export_id: str(export.path) for export in wanted.values()}
            live = self._manager.show()
            removed = [i for i in sorted(live) if paths.get(i) != live[i]]
            for export_id in removed:
                self._manager.remove(export_id)
            absent = [e for e in wanted.values() if live.get(e.export_id) != str(e.path)]
            missing = [export for export in absent if not export.path.is_dir()]
            added, failed = self._add_all([export for export in absent if export not in missing])
        report = ReconcileReport(
            files=len(wanted),
            added=tuple(added),
            removed=tuple(live[export_id] for export_id in removed),
            missing=tuple(export.name for export in missing),
            failed=tuple(failed),
        )
        (log.debug if report.clean else log.warning)(
            "exports reconciled",
            files=report.files,
            added=len(report.added),
            removed=report.removed,
            missing=report.missing,
            failed=report.failed,
        )
        return report

    def _add_all(self, exports: list[Export]) -> tuple[list[str], list[str]]:
        added, failed = [], []
        for export in exports:
            try:
                self._manager.add(self._files.path(export.name), export.export_id, path=export.path)
            except ExportRejected as error:
                log.error("export refused", volume=export.name, error=error)
                failed.append(export.name)
            else:
                added.append(export.name)
        return added, failed
