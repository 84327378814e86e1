"""A whole provisioner: each volume is a directory of this node, for clusters of one node."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from external_storage import (
    AssetRecord,
    AssetRecords,
    Parameters,
    PersistentVolume,
    ProvisionedVolume,
    Provisioner,
    ProvisioningFailed,
    ProvisionRequest,
    Settings,
    run,
)
from external_storage.confine import Confined


class HostPathSettings(Settings):
    root: Path = Path("/srv/volumes")
    """Directory that holds the volumes, and our records of them in `.records`; it must be there."""

    def validate(self) -> Iterable[str]:
        yield from super().validate()
        if not self.root.is_absolute() or self.root == Path("/"):
            yield f"--root: {str(self.root)!r} is not an absolute directory below /"


class HostPathParameters(Parameters):
    """What a class may say; any other key is refused."""

    mode: int = 0o770
    """Mode of a volume's directory."""

    def validate(self) -> Iterable[str]:
        if not 0 <= self.mode <= 0o7777:
            yield f"parameter 'mode': {self.mode:#o} is not between 0o0 and 0o7777"


class HostPath(Provisioner[HostPathSettings, HostPathParameters]):
    """Makes a directory for each claim, and removes it when its volume is deleted."""

    records: AssetRecords

    def start(self) -> None:
        self._root = Confined(self.settings.root)
        self.records = AssetRecords(self.settings.root / ".records")

    def stop(self) -> None:
        self._root.close()

    def provision(self, request: ProvisionRequest[HostPathParameters]) -> ProvisionedVolume:
        name = request.volume_name
        if self.records.get(name) is None:
            self.records.begin(name, claim=request.claim)
        self._root.mkdir(name, exist_ok=True)  # by an earlier call that did not come to its end
        self._root.chmod(name, request.parameters.mode)
        source = {"path": f"{self.settings.root}/{name}", "type": "Directory"}
        return ProvisionedVolume(source={"hostPath": source})

    def delete(self, volume: PersistentVolume) -> None:
        if self.records.get(volume.name) is None and volume.name in self._root.listdir():
            raise ProvisioningFailed(f"{volume.name} has no record of ours: nothing is removed")
        self._remove(volume.name)

    def discard(self, record: AssetRecord) -> None:
        self._remove(record.name)

    def _remove(self, name: str) -> None:
        if not self._root.remove_tree(name, stop=lambda: self.deadline.expired):
            raise ProvisioningFailed(f"{name} has more files than time allowed: it is gone on with")
        self.records.forget(name)


if __name__ == "__main__":
    run(HostPath, name="example.com/hostpath")
