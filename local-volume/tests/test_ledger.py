"""What the node remembers is there after everything, or the agent does not start."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from external_storage import CannotStart
from local_volume_provisioner import identity
from local_volume_provisioner.config import ClassConfig
from local_volume_provisioner.ledger import Ledger, Record, SavedClass, Use


def test_the_records_survive(tmp_path: Path) -> None:
    with ExitStack() as stack:
        ledger = Ledger(tmp_path)
        stack.callback(ledger.close)
        config = ClassConfig(name="c", host_dir="/d", mount_dir="/d")
        record = Record(
            path="/d/a",
            saved_class=SavedClass.of(config),
            use=Use.USED,
            identity=identity.Identity(kind="device"),
        )
        ledger.write([record])
        with pytest.raises(CannotStart, match=r"ledger\.db"):
            Ledger(tmp_path)
    again = Ledger(tmp_path)
    assert again.all() == [record]
    again.move("/d/a", "/d/b")
    assert [r.path for r in again.all()] == ["/d/b"]
    again.close()
    (tmp_path / "ledger.db").write_bytes(b"no database " * 1000)
    with pytest.raises(CannotStart, match="cannot be used"):
        Ledger(tmp_path)
