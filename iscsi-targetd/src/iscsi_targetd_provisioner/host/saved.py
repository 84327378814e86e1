"""The configuration that the host's restore service reads after a boot.

Not saved by rtslib: it also writes what others have running and did not save, it copies over the
file in place, where a power cut leaves half of it, and it takes longer the more targets there are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iscsi_targetd_provisioner.host.common import Refused

Touched = dict[str, set[str]]
"""By the name of a volume: the names of targets whose saved configuration is to be renewed."""

Dumps = Mapping[str, Any]
"""By name: what is running, None for what is gone."""


def merged(before: dict[str, Any] | None, backstores: Dumps, targets: Dumps) -> dict[str, Any]:
    """``before`` with these entries as they are now."""
    after = dict(before or {"fabric_modules": []})
    others = [
        entry
        for entry in after.get("storage_objects", [])
        if entry.get("plugin") != "block" or entry.get("name") not in backstores
    ]
    after["storage_objects"] = others + [dump for dump in backstores.values() if dump]
    others = [entry for entry in after.get("targets", []) if entry.get("wwn") not in targets]
    after["targets"] = others + [dump for dump in targets.values() if dump]
    return after


def read_saved(path: str) -> dict[str, Any] | None:
    """The saved configuration; None: there is none yet."""
    try:
        found: dict[str, Any] = json.loads(Path(path).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        text = f"{path} is damaged: repair it, or move it away and run targetcli saveconfig"
        raise Refused("failed", text) from None
    return found


def write_saved(path: str, content: Mapping[str, Any]) -> None:
    """All of it or nothing, and there after a power cut; it holds secrets: mode 0600."""
    directory = Path(path).parent
    directory.mkdir(parents=True, exist_ok=True)
    temporary = Path(path + ".external-storage")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            # At once and on one line: with an indent it is Python that writes, ten times slower.
            file.write(json.dumps(content, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink()
        raise
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
