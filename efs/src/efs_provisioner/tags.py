"""The tags of access points: whose they are, and what an admin wants on them beside that."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import external_storage
from external_storage import PersistentVolumeClaim

CLUSTER: Final = "external-storage/cluster"
PROVISIONER: Final = "external-storage/provisioner"
VOLUME: Final = "external-storage/volume"
CLAIM: Final = "external-storage/claim"
CLAIM_UID: Final = "external-storage/claim-uid"
NAME: Final = "Name"
_OURS: Final = frozenset({CLUSTER, PROVISIONER, VOLUME, CLAIM, CLAIM_UID, NAME})

MAX_TAGS: Final = 50
"""Of one access point, ours among them."""
_MAX_KEY: Final = 128
_MAX_VALUE: Final = 256
# AWS allows letters, digits and spaces of every script, and these.
_ALLOWED: Final = "_.:/=+-@"
_ITEM = re.compile(r"(?:\\.|[^\\\s])+")
_PART = re.compile(r"(?:\\.|[^\\:])*")
_ESCAPE = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Owner:
    """Who has made an access point."""

    cluster: str
    provisioners: tuple[str, ...]
    """All names that we answer to."""

    def tags(
        self, volume: str, *, claim: PersistentVolumeClaim, provisioner: str
    ) -> dict[str, str]:
        """What is written on the access point of a volume; for people and for finding it again."""
        return {
            NAME: volume[:_MAX_VALUE],
            CLUSTER: self.cluster,
            PROVISIONER: provisioner,
            VOLUME: volume[:_MAX_VALUE],
            CLAIM: claim.key[:_MAX_VALUE],
            CLAIM_UID: claim.uid,
        }

    def has_made(self, tags: Mapping[str, str]) -> bool:
        """Whether tags say that it was one of us, in this cluster."""
        return tags.get(CLUSTER) == self.cluster and tags.get(PROVISIONER) in self.provisioners

    def has_made_for(self, volume: str, tags: Mapping[str, str]) -> bool:
        """Whether it was also for this very volume."""
        return self.has_made(tags) and tags.get(VOLUME) == volume[:_MAX_VALUE]

    def of_records(self) -> external_storage.Owner:
        """The same, as records of directories have it."""
        return external_storage.Owner(self.cluster, self.provisioners)

    def token(self, claim_uid: str, *, provisioner: str) -> str:
        """The ``ClientToken`` for a claim: the same in every try, in no other cluster.

        With the cluster in it, because one that was restored from a backup has the same claims.
        """
        text = "\n".join((self.cluster, provisioner, claim_uid))
        return hashlib.sha256(text.encode()).hexdigest()


def parse(text: str) -> dict[str, str]:
    """Tags as ``key:value key2:value2``; a backslash before a space, colon or backslash.

    Raises ValueError that says what is wrong, also with what AWS would not take.
    """
    found: dict[str, str] = {}
    rest = _ITEM.sub("", text)
    if rest.strip():
        raise ValueError(f"{text!r}: a backslash stands before nothing")
    for item in _ITEM.findall(text):
        parts = [_ESCAPE.sub(r"\1", part) for part in _split(item)]
        if len(parts) > 2:
            raise ValueError(f"{item!r} has more than one colon: write \\: for one in the value")
        key, value = parts[0], parts[1] if len(parts) == 2 else ""
        if problem := _problem(key, value):
            raise ValueError(f"{item!r}: {problem}")
        if key in found:
            raise ValueError(f"the tag {key!r} is given twice")
        found[key] = value
    if len(found) > MAX_TAGS - len(_OURS):
        raise ValueError(f"{len(found)} tags: at most {MAX_TAGS - len(_OURS)} are possible")
    return found


def _split(item: str) -> list[str]:
    parts, at = [], 0
    while True:
        match = _PART.match(item, at)
        end = match.end() if match else len(item)
        parts.append(item[at:end])
        if end >= len(item):
            return parts
        at = end + 1


def _problem(key: str, value: str) -> str | None:
    if not 1 <= len(key) <= _MAX_KEY:
        return f"a key has 1 to {_MAX_KEY} characters"
    if len(value) > _MAX_VALUE:
        return f"a value has at most {_MAX_VALUE} characters"
    if key.lower().startswith("aws:"):
        return "keys that begin with aws: are AWS's own"
    if key in _OURS:
        return f"the key {key} is set by the provisioner"
    bad = [c for c in key + value if not (c.isalnum() or c == " " or c in _ALLOWED)]
    if bad:
        return f"{bad[0]!r} is not allowed: want letters, digits, spaces or {_ALLOWED}"
    return None
