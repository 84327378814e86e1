"""What goes wrong on a real storage host, and what an admin has beside us on it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator

import pytest
from tests.backend_suite import CHAP, Bench
from tests.storage_host import GROUP, INITIATOR, IQN, PORTAL, SAVED, StorageHost

from external_storage import ProvisioningFailed, ProvisioningInBackground, Unchanged
from iscsi_targetd_provisioner.backend import Access
from iscsi_targetd_provisioner.chap import Chap
from iscsi_targetd_provisioner.lio_ssh import LioSsh
from iscsi_targetd_provisioner.names import Portal

# An emulated guest is some ten times slower than its host, and the host may be busy.
pytestmark = pytest.mark.timeout(900)
NAME = "pvc-1"
TARGET = f"{IQN}:{NAME}"
ADMINS = "iqn.2026-01.com.example:of-an-admin"


@pytest.fixture
def host(storage_host: StorageHost) -> Iterator[StorageHost]:
    """As it was, after the test too."""
    yield storage_host
    storage_host.clear()


@pytest.fixture
def backend(host: StorageHost) -> Iterator[LioSsh]:
    made = host.backend()
    yield made
    made.close()


@pytest.fixture
def bench(backend: LioSsh) -> Bench:
    return Bench(backend, GROUP, portals=(PORTAL,))


def session_settings(chap: Chap) -> list[tuple[str, str]]:
    found = [("authmethod", "CHAP"), ("username", chap.user), ("password", chap.password)]
    found += [("username_in", chap.mutual_user), ("password_in", chap.mutual_password)]
    return [(f"node.session.auth.{key}", value) for key, value in found]


def test_a_target_proves_itself_on_each_of_its_portals(
    host: StorageHost, backend: LioSsh, bench: Bench
) -> None:
    portals = (PORTAL, Portal("::1"), Portal("127.0.0.1", 3261))
    backend._listen = portals
    backend.create(GROUP, NAME, 8 << 20, deadline=bench.deadline)
    access = Access(initiators={INITIATOR}, portals=portals, chap=CHAP)
    backend.export(GROUP, NAME, access, deadline=bench.deadline)
    impostor = Chap(CHAP.user, CHAP.password, CHAP.mutual_user, "what the target does not know")
    for portal in portals:
        assert host.log_in(TARGET, session_settings(impostor), portal=portal) != 0
        assert host.log_in(TARGET, session_settings(CHAP), portal=portal) == 0
        host.log_out(TARGET, portal=portal)
    bench.remove(NAME)


def test_what_an_admin_has_on_the_host_stays(host: StorageHost, bench: Bench) -> None:
    run = host.guest.run
    run("truncate -s 8M /tmp/admins")
    commands = [
        "/backstores/fileio create admins /tmp/admins",
        # Else targetcli has each target listen on all addresses, and no other can have one of them.
        "set global auto_add_default_portal=false",
        f"/iscsi create {ADMINS}",
        f"/iscsi/{ADMINS}/tpg1/luns create /backstores/fileio/admins",
        f"/iscsi create {TARGET}",
        f"/iscsi/{TARGET}/tpg1/luns create /backstores/fileio/admins",
        "/ saveconfig",
        "exit",
    ]
    run(["targetcli"], input="\n".join(commands) + "\n", timeout_s=300)
    before = json.loads(host.saved())
    # A volume comes and goes, and one whose target the admin has taken the name of cannot come.
    bench.make("pvc-2", INITIATOR)
    assert host.running() == {ADMINS, TARGET, f"{IQN}:pvc-2"}
    bench.backend.create(GROUP, NAME, 8 << 20, deadline=bench.deadline)
    with pytest.raises(ProvisioningFailed, match="other LUNs: it is left alone"):
        bench.backend.export(GROUP, NAME, bench.access(INITIATOR), deadline=bench.deadline)
    for name in (NAME, "pvc-2"):
        bench.remove(name)
    assert host.running() == {ADMINS, TARGET}
    assert host.volumes() == set()
    after = json.loads(host.saved())
    assert sorted(map(str, after["targets"])) == sorted(map(str, before["targets"]))
    assert after["storage_objects"] == before["storage_objects"]


def test_a_helper_that_is_killed_and_a_lock_that_is_held_leave_nothing_half_made(
    host: StorageHost, bench: Bench
) -> None:
    run = host.guest.run
    assert bench.names() == set()
    # As an open shell of targetcli does, until its file goes.
    run(
        "touch /run/held; (flock 9; while [ -e /run/held ]; do sleep 0.1; done) "
        "9>/var/run/targetcli.lock >/dev/null 2>&1 & sleep 1"
    )
    with pytest.raises(Unchanged, match="is a targetcli shell open on the host"):
        bench.backend.create(GROUP, NAME, 8 << 20, deadline=bench.within(6.0))
    ended: list[BaseException] = []

    def create() -> None:
        with contextlib.suppress(ProvisioningInBackground):
            bench.backend.create(GROUP, NAME, 8 << 20, deadline=bench.deadline)
            return
        ended.append(ProvisioningInBackground())

    waiting = threading.Thread(target=create)
    waiting.start()
    session = bench.backend._helper._session  # type: ignore[attr-defined]
    while not session._waiting:
        waiting.join(0.05)
    run("pkill -9 -f '^python3 -c import sys;s=sys.stdin.buffer'")
    waiting.join(120)
    assert ended, "how it ended was not known"
    run("rm /run/held")
    # What was asked for again is there once.
    bench.make(NAME, INITIATOR)
    assert (host.volumes(), host.running()) == ({NAME}, {TARGET})
    bench.remove(NAME)
    assert (host.volumes(), host.running()) == (set(), set())


def test_a_host_whose_disk_is_full_keeps_its_old_configuration(
    host: StorageHost, bench: Bench
) -> None:
    run = host.guest.run
    bench.make("pvc-0", INITIATOR)
    directory = SAVED.rpartition("/")[0]
    saved = host.saved()
    run(f"mount -t tmpfs -o size=64k none {directory}")
    try:
        run(f"cat >{SAVED}", input=saved)
        run(f"dd if=/dev/zero of={directory}/filled bs=4k 2>/dev/null", check=False)
        with pytest.raises(ProvisioningFailed, match=r"cannot be saved: .*No space left"):
            bench.make(NAME, INITIATOR)
        assert host.saved() == saved
        assert run(f"ls {directory}").split() == ["filled", "saveconfig.json"]
        run(f"rm {directory}/filled")
        bench.make(NAME, INITIATOR)
        assert TARGET in host.saved()
        for name in (NAME, "pvc-0"):
            bench.remove(name)
        assert (host.volumes(), host.running()) == (set(), set())
    finally:
        run(f"umount {directory}")
