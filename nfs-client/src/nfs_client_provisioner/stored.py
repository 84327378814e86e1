"""What stands on a volume since it was made: its end needs neither its class nor a guess."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from external_storage import PersistentVolume
from nfs_client_provisioner.parameters import OnDelete

_PREFIX: Final = "nfs-client.external-storage/"
BASE: Final = f"{_PREFIX}base"
PATH: Final = f"{_PREFIX}path"
ON_DELETE: Final = f"{_PREFIX}on-delete"
RETENTION: Final = f"{_PREFIX}archive-retention-seconds"


class BadStored(Exception):
    """Annotations that do not say what is to be done; the text names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The annotations of a volume of ours.

    All but the policy repeats what the volume's source says: the two have to agree. The policy may
    be changed on the volume by who may write volumes, and then counts.
    """

    base: str
    """The server's directory that ``path`` is below."""
    path: str
    on_delete: OnDelete
    archive_retention_s: float | None = None
    """Age at which the archived directory is removed; None: what the settings say by then."""

    def annotations(self) -> dict[str, str]:
        """As they stand on the volume."""
        found = {BASE: self.base, PATH: self.path, ON_DELETE: self.on_delete.value}
        if self.archive_retention_s is not None:
            found[RETENTION] = f"{self.archive_retention_s:g}"
        return found

    @classmethod
    def from_volume(cls, volume: PersistentVolume) -> Self | None:
        """None for a volume of nfs-subdir-external-provisioner, which has none of them.

        Raises ``BadStored`` if some are missing or cannot be read.
        """
        annotations = volume.metadata.annotations
        if not any(key.startswith(_PREFIX) for key in annotations):
            return None
        if missing := [key for key in (BASE, PATH, ON_DELETE) if not annotations.get(key)]:
            raise BadStored(f"the volume has no annotation {', '.join(missing)}")
        return cls(
            base=annotations[BASE],
            path=annotations[PATH],
            on_delete=_policy(annotations[ON_DELETE]),
            archive_retention_s=_seconds(annotations.get(RETENTION)),
        )


def _policy(text: str) -> OnDelete:
    try:
        return OnDelete(text.strip().lower())
    except ValueError:
        allowed = ", ".join(policy.value for policy in OnDelete)
        raise BadStored(f"annotation {ON_DELETE}: {text[:80]!r} is not one of: {allowed}") from None


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise BadStored(f"annotation {RETENTION}: {text[:80]!r} is not a number of seconds above 0")
    return value
