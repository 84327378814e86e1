"""A provisioner that counts its volumes is told of each one by the library's own watch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from external_storage import PersistentVolume

Until = Callable[..., Any]


class Seen:
    """The names of volumes, as a handler is told of them."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def observe(self, old: PersistentVolume | None, new: PersistentVolume | None) -> None:
        if new is not None:
            assert (old is not None) == (new.name in self.names)
            self.names.add(new.name)
        elif old is not None:
            self.names.remove(old.name)


def test_volumes_of_ours_are_told_before_the_first_claim_is_worked_and_others_never(
    rig: Any, until: Until
) -> None:
    storage_class = rig.storage_class()
    rig.start()
    rig.claim("first", storage_class)
    first = rig.bound("first").name
    rig.manager.stop()
    name = f"{rig.namespace}-static"
    static = {
        "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "capacity": {"storage": "1Gi"},
            "hostPath": {"path": str(rig.root)},
        },
    }
    rig.api.create(PersistentVolume, static)
    rig.stack.callback(rig.drop, PersistentVolume, name)
    seen = Seen()
    rig.methods["start"] = lambda folders: folders.context.watch_volumes(seen.observe)
    known: list[set[str]] = []
    rig.claim("second", storage_class)
    rig.start(declare={"on_provision": lambda _request: known.append(set(seen.names))})
    second = rig.bound("second").name
    assert known == [{first}]
    until(lambda: seen.names == {first, second}, "the second is told")
    rig.delete_claim("first")
    until(lambda: seen.names == {second}, "the first is told to be gone")
