"""Export files, ids, and the two kept the same as what is live."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nfs_provisioner.export_files import parse, render
from nfs_provisioner.export_ids import ExportIdsExhausted
from nfs_provisioner.exportmgr import BusUnavailable, ExportRejected
from nfs_provisioner.exports import Export, ExportFiles, ExportIds, Squash

VOLUME_NAMES = st.from_regex(r"[a-z0-9][a-z0-9.-]{0,60}", fullmatch=True)


def _export(name: str = "pvc-a", export_id: int = 1, **changes) -> Export:
    values = {"path": Path("/srv/nfs") / name, "pseudo": f"/export/{name}", **changes}
    return Export(export_id=export_id, name=name, **values)


# Files


@given(
    name=VOLUME_NAMES,
    export_id=st.integers(1, 65535).filter(lambda i: i != 152),
    path=st.text(
        st.characters(exclude_categories=("Cc", "Cs"), exclude_characters='"\\'), max_size=40
    ),
    squash=st.sampled_from(Squash),
)
def test_what_is_rendered_is_read_back(name, export_id, path, squash) -> None:
    export = _export(name, export_id, path=Path("/srv/" + path), squash=squash)
    assert parse(render(export)) == export


@given(data=st.data())
def test_a_file_cut_short_anywhere_is_refused(data) -> None:
    text = render(_export())
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(ValueError, match="not a complete export file"):
        parse(text[:cut])


@pytest.mark.parametrize(
    "changes",
    [
        {"export_id": 0},
        {"export_id": 152},
        {"export_id": 65536},
        {"name": "../x"},
        {"path": Path('/srv/a"b')},
        {"path": Path("/srv/a\nb")},
        {"path": Path("/srv/a\\b")},
        {"path": Path("relative")},
        {"pseudo": '/export/"'},
        {"pseudo": "export/x"},
    ],
)
def test_what_cannot_be_exported_is_refused(changes) -> None:
    with pytest.raises(ValueError, match="not a"):
        _export(**changes)


@pytest.fixture
def files(tmp_path) -> ExportFiles:
    files = ExportFiles(tmp_path / ".state")
    files.prepare()
    return files


def test_files_are_written_loaded_and_deleted(files) -> None:
    first, second = _export("pvc-a", 1), _export("pvc-b", 2, squash=Squash.ROOT_ID_SQUASH)
    assert files.write(first) == files.directory / "pvc-a.conf"
    files.write(second)
    assert files.load() == {"pvc-a": first, "pvc-b": second}
    files.delete("pvc-a")
    files.delete("pvc-a")
    assert files.load() == {"pvc-b": second}


def test_writing_again_changes_only_what_differs(files) -> None:
    inode = files.write(_export()).stat().st_ino
    assert files.write(_export()).stat().st_ino == inode
    files.write(_export(squash=Squash.ROOT_ID_SQUASH))
    assert files.load()["pvc-a"].squash is Squash.ROOT_ID_SQUASH


def test_killed_between_write_and_rename_leaves_nothing(files) -> None:
    """What a SIGKILL leaves is one file in the staging directory, whole or half."""
    files.write(_export("pvc-a", 1))
    staging = files.directory.parent / "exports.tmp"
    (staging / "pvc-b.conf").write_text(render(_export("pvc-b", 2)))
    (staging / "pvc-c.conf").write_text("EXPORT {\n    Export_Id = 3;\n    Pa")
    files.write(_export("pvc-b", 2))  # in the same process as well: the left-over is overwritten
    again = ExportFiles(files.directory.parent)
    again.prepare()
    assert list(staging.iterdir()) == []
    assert sorted(again.load()) == ["pvc-a", "pvc-b"]


def test_damaged_and_foreign_files_are_set_aside_and_said(files, caplog) -> None:
    good = _export("pvc-good", 1)
    files.write(good)
    damage = {
        "pvc-cut.conf": render(_export("pvc-cut", 2))[:-10],
        "pvc-other.conf": render(_export("pvc-else", 3)),
        "pvc-twice.conf": render(_export("pvc-twice", 1)),
        "by-hand.conf": 'EXPORT { Export_Id = 9; Path = "/srv"; Pseudo = "/srv"; }',
        "editor.swp": "\0\xff",
        "empty.conf": "",
    }
    for name, text in damage.items():
        (files.directory / name).write_text(text, encoding="latin-1")
    (files.directory / "link.conf").symlink_to("/nowhere")
    (files.directory / "directory").mkdir()
    assert files.load() == {"pvc-good": good}
    bad = files.directory.parent / "exports.bad"
    assert sorted(p.name for p in bad.iterdir()) == sorted([*damage, "link.conf", "directory"])
    assert (bad / "pvc-cut.conf").read_text() == damage["pvc-cut.conf"]
    assert caplog.text.count("export file set aside") == len(damage) + 2
    (files.directory / "empty.conf").touch()
    files.load()
    assert (bad / "empty.conf.1").exists(), "an earlier one is kept"


def test_a_name_too_long_for_its_file_is_refused(files) -> None:
    with pytest.raises(ValueError, match="too long"):
        files.write(_export("a" * 251))


# Ids


class IdsMachine(RuleBasedStateMachine):
    """Against a plain model: a dictionary, and the order in which ids became free."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = ExportIds()
        self.model: dict[str, int] = {}
        self.freed: list[int] = []

    @rule(name=VOLUME_NAMES)
    def allocate(self, name) -> None:
        export_id = self.ids.allocate(name)
        if name in self.model:
            assert export_id == self.model[name]
            return
        assert 1 <= export_id <= 65535
        assert export_id != 152
        assert export_id not in self.model.values()
        assert export_id not in self.freed, "there are fresh ones left"
        self.model[name] = export_id

    @rule(name=VOLUME_NAMES, export_id=st.integers(-1, 65537))
    def claim(self, name, export_id) -> None:
        usable = 1 <= export_id <= 65535 and export_id != 152
        free = export_id not in self.model.values()
        if self.model.get(name) == export_id or (usable and free and name not in self.model):
            self.ids.claim(name, export_id)
            self.model[name] = export_id
            if export_id in self.freed:
                self.freed.remove(export_id)
        else:
            with pytest.raises(ValueError, match=str(export_id)):
                self.ids.claim(name, export_id)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        self.ids.release(name)
        self.ids.release(name)
        self.freed.append(self.model.pop(name))

    @invariant()
    def same(self) -> None:
        assert self.ids.used() == self.model


TestIds = IdsMachine.TestCase
TestIds.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_ids_run_out_with_a_clear_error_and_come_back() -> None:
    ids = ExportIds()
    given_out = {ids.allocate(f"pvc-{n}") for n in range(65534)}
    assert given_out == set(range(1, 65536)) - {152}
    with pytest.raises(ExportIdsExhausted, match="all 65534 export ids are in use"):
        ids.allocate("pvc-more")
    freed = ids.used()["pvc-77"]
    ids.release("pvc-77")
    assert ids.allocate("pvc-more") == freed


def test_freed_ids_are_used_again_as_late_as_possible() -> None:
    ids = ExportIds({"a": 10, "b": 500})
    assert ids.allocate("c") == 501
    ids.release("c")
    ids.release("a")
    rest = [ids.allocate(f"pvc-{n}") for n in range(65534 - 1)]
    assert rest[0] == 502
    assert rest[-2:] == [501, 10]


def test_used_ids_must_be_usable_and_distinct() -> None:
    for used in ({"a": 0}, {"a": 152}, {"a": 65536}, {"a": 7, "b": 7}):
        with pytest.raises(ValueError, match="export id"):
            ExportIds(used)


# Live


def test_publish_and_withdraw_live_and_again(server) -> None:
    export = server.volume("pvc-a")
    assert server.can_list("/export/pvc-a")
    server.exports.publish(export)
    server.exports.withdraw("pvc-a", export.export_id)
    assert not server.can_list("/export/pvc-a")
    assert server.manager.show() == {}
    assert server.files.load() == {}
    assert server.ids.used() == {"pvc-a": export.export_id}, "freed by who forgets the record"
    server.exports.withdraw("pvc-a", export.export_id)
    server.exports.withdraw("pvc-never", 4711)


def test_publish_goes_on_where_a_killed_one_stopped(server) -> None:
    """After the file, and after AddExport whose answer nobody got."""
    for name, also_live in (("pvc-a", False), ("pvc-b", True)):
        server.directories.create(name, mode=0o777, gid=None)
        export = server.exports.describe(name, server.ids.allocate(name))
        file = server.files.write(export)
        if also_live:
            server.manager.add(file, export.export_id, path=export.path)
        server.exports.publish(export)
        assert server.manager.path_of(export.export_id) == str(export.path)


def test_published_options_are_what_clients_get(server) -> None:
    server.directories.create("pvc-a", mode=0o700, gid=None)
    export = server.exports.describe("pvc-a", 7, squash=Squash.ROOT_ID_SQUASH)
    server.exports.publish(export)
    assert not server.can_list("/export/pvc-a"), "root of the client is nobody here"
    server.directories.create("pvc-b", mode=0o700, gid=None)
    server.exports.publish(server.exports.describe("pvc-b", 8))
    server.put("/export/pvc-b/file", "root may")
    assert (server.root / "pvc-b/file").stat().st_uid == 0


def test_rejected_publish_leaves_no_file(server) -> None:
    missing = server.exports.describe("pvc-a", server.ids.allocate("pvc-a"))
    with pytest.raises(ExportRejected, match="not a directory"):
        server.exports.publish(missing)
    # /proc has no file handles: Ganesha itself refuses it.
    unfit = _export("pvc-b", server.ids.allocate("pvc-b"), path=Path("/proc"))
    with pytest.raises(ExportRejected, match="error"):
        server.exports.publish(unfit)
    assert server.files.load() == {}
    assert server.manager.show() == {}


def test_publish_never_takes_another_volumes_id(server) -> None:
    export = server.volume("pvc-a")
    server.directories.create("pvc-b", mode=0o777, gid=None)
    with pytest.raises(ValueError, match="belongs to pvc-a"):
        server.exports.publish(server.exports.describe("pvc-b", export.export_id))
    assert list(server.files.load()) == ["pvc-a"]


def test_withdraw_never_removes_another_volumes_export(server) -> None:
    """A record that names the wrong id (edited, restored from a backup) harms nobody."""
    kept = server.volume("pvc-kept")
    server.exports.withdraw("pvc-stale", kept.export_id)
    assert server.manager.path_of(kept.export_id) == str(kept.path)
    assert server.can_list("/export/pvc-kept")
    assert server.ids.used() == {"pvc-kept": kept.export_id}


def test_interrupted_withdraw_is_finished_later_and_frees_no_other_id(server, monkeypatch) -> None:
    """The case of duplicate ids: the delete fails at the server, another volume comes, retry."""
    export = server.volume("pvc-a")
    remove = server.manager.remove

    def lost(export_id: int) -> None:
        raise BusUnavailable("gone")

    monkeypatch.setattr(server.manager, "remove", lost)
    with pytest.raises(BusUnavailable):
        server.exports.withdraw("pvc-a", export.export_id)
    monkeypatch.setattr(server.manager, "remove", remove)
    other = server.volume("pvc-b")
    for _ in range(2):  # a delete is tried again after it was done, too
        server.exports.withdraw("pvc-a", export.export_id)
        server.ids.release("pvc-a")
    assert server.manager.show() == {other.export_id: str(other.path)}
    assert server.ids.used() == {"pvc-b": other.export_id}


def test_withdrawn_export_does_not_come_back_with_ganesha(server, wait_until) -> None:
    kept, gone = server.volume("pvc-kept"), server.volume("pvc-gone")
    server.exports.withdraw("pvc-gone", gone.export_id)
    os.kill(server.ganesha.pid, signal.SIGKILL)
    wait_until(lambda: server.restarted, what="ganesha is back")
    assert server.manager.show() == {kept.export_id: str(kept.path)}


def test_reconcile_makes_live_what_the_files_say(server) -> None:
    kept, unserved, unfiled = (server.volume(f"pvc-{n}") for n in ("kept", "unserved", "unfiled"))
    moved = server.volume("pvc-moved")
    server.manager.remove(unserved.export_id)
    server.files.delete("pvc-unfiled")
    # Under the id of pvc-moved another directory is live.
    server.manager.remove(moved.export_id)
    impostor = server.exports.describe("pvc-impostor", moved.export_id)
    server.directories.create("pvc-impostor", mode=0o755, gid=None)
    file = server.files.write(impostor)
    server.manager.add(file, impostor.export_id, path=impostor.path)
    server.files.delete("pvc-impostor")

    report = server.exports.reconcile()

    assert report.files == 3
    assert report.added == ("pvc-moved", "pvc-unserved")
    assert set(report.removed) == {str(unfiled.path), str(impostor.path)}
    assert (report.missing, report.failed) == ((), ())
    assert not report.clean
    assert server.manager.show() == {
        export.export_id: str(export.path) for export in (kept, unserved, moved)
    }
    assert server.exports.reconcile().clean


def test_missing_directory_does_not_stop_the_others(stopped_server, wait_until) -> None:
    server = stopped_server
    for name in ("pvc-a", "pvc-lost", "pvc-z"):
        server.directories.create(name, mode=0o777, gid=None)
        server.files.write(server.exports.describe(name, server.ids.allocate(name)))
    (server.root / "pvc-lost").rmdir()
    server.ganesha.start()
    report = server.exports.reconcile()
    assert report.missing == ("pvc-lost",)
    assert sorted(server.manager.show().values()) == [
        str(server.root / "pvc-a"),
        str(server.root / "pvc-z"),
    ]
    server.put("/export/pvc-z/file", "served")
    (server.root / "pvc-lost").mkdir()
    assert server.exports.reconcile().added == ("pvc-lost",)


def test_reconcile_reports_what_ganesha_refuses(server, monkeypatch) -> None:
    server.volume("pvc-a")
    refused = server.volume("pvc-b")
    server.volume("pvc-c")
    for export_id in server.manager.show():
        server.manager.remove(export_id)
    add = server.manager.add

    def picky(file, export_id, *, path) -> None:
        if path == refused.path:
            raise ExportRejected("no")
        add(file, export_id, path=path)

    monkeypatch.setattr(server.manager, "add", picky)
    report = server.exports.reconcile()
    assert (report.added, report.failed) == (("pvc-a", "pvc-c"), ("pvc-b",))


def test_publishing_again_with_another_squash_replaces_the_live_export(server) -> None:
    first = server.volume("pvc-a")
    changed = server.exports.describe("pvc-a", first.export_id, squash=Squash.ROOT_ID_SQUASH)
    removed: list[int] = []
    remove = server.manager.remove

    def noted(export_id: int) -> None:
        removed.append(export_id)
        remove(export_id)

    server.manager.remove = noted
    server.exports.publish(changed)
    assert removed == [first.export_id]
    assert server.manager.path_of(first.export_id) == str(first.path)
    server.exports.publish(changed)
    assert removed == [first.export_id], "the same again changes nothing"
