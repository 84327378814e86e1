"""What an asset record keeps about a volume's export."""

from __future__ import annotations

from dataclasses import dataclass

from external_storage import AssetRecord
from nfs_provisioner.export_files import Squash


@dataclass(frozen=True, slots=True)
class ExportDetails:
    """What a record keeps beside the library's own: enough to write the export file again."""

    export_id: int
    squash: Squash

    def as_json(self) -> dict[str, object]:
        return {"exportId": self.export_id, "squash": self.squash.value}


class DetailsError(Exception):
    """A record that lacks what we need of it."""


def details_of(record: AssetRecord) -> ExportDetails:
    """The details of a record; ``DetailsError`` if they are not there or cannot be."""
    export_id, squash = record.details.get("exportId"), record.details.get("squash")
    if not isinstance(export_id, int) or squash not in list(Squash):
        raise DetailsError(f"its record has no usable export: {record.details}")
    return ExportDetails(export_id, Squash(squash))
