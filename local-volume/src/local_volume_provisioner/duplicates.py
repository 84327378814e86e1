"""Of entries that lead to the same data, exactly one becomes a volume.

Two names of one disk, a disk and its partition, a partition and the LVM volume on it, a file system
mounted twice or mounted and linked as a device, a directory of a bind mount and one in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from local_volume_provisioner.scan import Candidate, Kind


@dataclass(frozen=True, slots=True)
class Choice:
    """The candidates that count, by path, and what the others are duplicates of."""

    chosen: dict[str, Candidate]
    duplicates: dict[str, str]
    """By path: what to tell about it."""


def choose(candidates: Iterable[Candidate], rank: Callable[[Candidate], int]) -> Choice:
    """``rank``: the lowest wins (a volume in use before one that is free); then class and path."""
    taken = _Taken()
    choice = Choice({}, {})
    for candidate in sorted(candidates, key=lambda c: (rank(c), c.class_config.name, c.path)):
        if candidate.path in choice.chosen:
            other = choice.chosen[candidate.path].class_config.name
            text = f"the classes {other} and {candidate.class_config.name} both want it"
            choice.duplicates.setdefault(candidate.path, text)
            continue
        found = taken.conflict(candidate)
        if found is not None:
            text = f"it leads to the same data as {found.path} of class {found.class_config.name}"
            choice.duplicates[candidate.path] = text
            continue
        taken.add(candidate)
        choice.chosen[candidate.path] = candidate
    for path in choice.chosen:
        # One path in two classes is a volume of the first, and no duplicate of itself.
        choice.duplicates.pop(path, None)
    return choice


@dataclass(slots=True)
class _Taken:
    """What has been chosen, so that each further one is compared in few steps."""

    devices: dict[int, Candidate] = field(default_factory=dict)
    """By number."""
    families: dict[int, Candidate] = field(default_factory=dict)
    """By the numbers of all that share data with a chosen device."""
    mounted: dict[int, Candidate] = field(default_factory=dict)
    """By the numbers of all that share data with a chosen mount."""
    roots: dict[tuple[int, str], Candidate] = field(default_factory=dict)
    above: dict[tuple[int, str], Candidate] = field(default_factory=dict)
    """By the directories above the roots of chosen mounts."""

    def add(self, candidate: Candidate) -> None:
        if candidate.kind is Kind.DEVICE:
            self.devices[candidate.number] = candidate
            for number in candidate.family:
                self.families.setdefault(number, candidate)
            return
        for number in candidate.family:
            self.mounted.setdefault(number, candidate)
        self.roots[candidate.number, candidate.root] = candidate
        for directory in _above(candidate.root):
            self.above.setdefault((candidate.number, directory), candidate)

    def conflict(self, candidate: Candidate) -> Candidate | None:
        if candidate.kind is Kind.DEVICE:
            return (
                self.families.get(candidate.number)
                or self.mounted.get(candidate.number)
                or self._first(self.devices, candidate.family)
            )
        found = self.families.get(candidate.number) or self._first(self.devices, candidate.family)
        if found is not None:
            return found
        roots = [candidate.root, *_above(candidate.root)]
        same = next(
            (self.roots[candidate.number, r] for r in roots if self._is_root(candidate, r)), None
        )
        return same or self.above.get((candidate.number, candidate.root))

    def _is_root(self, candidate: Candidate, root: str) -> bool:
        return (candidate.number, root) in self.roots

    @staticmethod
    def _first(known: dict[int, Candidate], numbers: Iterable[int]) -> Candidate | None:
        return next((known[number] for number in sorted(numbers) if number in known), None)


def _above(root: str) -> list[str]:
    """The directories above it: of ``/a/b`` these are ``/a`` and ``/``."""
    if root == "/":
        return []
    parts = root.strip("/").split("/")
    return ["/" + "/".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]
