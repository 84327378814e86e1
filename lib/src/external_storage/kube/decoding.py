"""Decoders, one for each type, made by one thread at a time.

msgspec works out a type when it first meets it, and crashes the process when two threads do that
for the same type at once (seen with 0.22). So the types that we define are worked out here and when
their modules are imported, and never by whichever worker comes first.
"""

from __future__ import annotations

import threading
from typing import Any

import msgspec

from external_storage.kube.types import KubeObject

_lock = threading.Lock()
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


def decoder(kind: Any) -> msgspec.json.Decoder[Any]:  # noqa: ANN401  (a generic alias is no type)
    """The JSON decoder of a type; safe to call, and to use, from any thread."""
    found = _decoders.get(kind)
    if found is None:
        with _lock:
            found = _decoders.get(kind)
            if found is None:
                found = _decoders[kind] = msgspec.json.Decoder(kind)
    return found


for _kind in KubeObject.__subclasses__():
    decoder(_kind)
