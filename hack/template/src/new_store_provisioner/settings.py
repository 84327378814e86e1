"""What an admin sets, and what a class may say."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from external_storage import Parameters, Settings


class NewStoreSettings(Settings):
    """Flags and environment, beside those of every provisioner."""

    # REPLACE: where your back end is, and who we are to it. Secrets come from files, never from
    # flags: everybody on the node can read those.
    volume_root: Path = Path("/srv/new-store")
    """Directory that holds the volumes and our records; the same path on the nodes as in our pod.
    It must be there."""

    def validate(self) -> Iterable[str]:
        yield from super().validate()
        if not self.volume_root.is_absolute() or self.volume_root == Path("/"):
            yield f"--volume-root: {str(self.volume_root)!r} is not an absolute directory below /"


class NewStoreParameters(Parameters):
    """Parameters of a class of new-store-provisioner."""

    # REPLACE: what a class may choose.
    gid: int | None = None
    """Group that owns a volume (mode 2770) and is added to the pods that use it; `none`: writable
    by everybody (mode 2777)."""

    def validate(self) -> Iterable[str]:
        if self.gid is not None and not 1 <= self.gid < 2**32 - 1:
            yield f"parameter 'gid': {self.gid} is not 'none' or a group id from 1 to {2**32 - 2}"
