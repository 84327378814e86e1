"""Whatever happens around them: a user's disk keeps its data, the next user sees nothing of it, and
disks that are not ours stay byte for byte what they were.

40 operations by default; CANARY_OPERATIONS=1000 in the environment for the long run, and
CANARY_SEED for one that has failed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from external_storage import PersistentVolume, PersistentVolumeClaim
from external_storage.kube.errors import KubeError, NotFound
from external_storage.testing.waiting import wait_until
from local_volume_provisioner.names import LABEL_NODE
from local_volume_provisioner.records import claim_uid
from local_volume_provisioner.requests import Request, Requests, Wish
from local_volume_provisioner.volumes import identity_of

MIB = 1 << 20
OPERATIONS = int(os.environ.get("CANARY_OPERATIONS", "40"))
DISKS = 4
PLACE = 12 * MIB
"""Where users write; ``write`` stays below it."""
HELD = "d-held"
"""Bound from the beginning to the end."""


@dataclass
class World:
    """Disks that come, go and change names, and users that claim and release them."""

    node: Any
    random: random.Random
    attached: dict[str, Any] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    holds: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """By the volume's UID: the disk that a user has written to, and what."""
    left: dict[str, set[bytes]] = field(default_factory=dict)
    """By disk: what earlier users have left there, and the next one must not see."""
    seen: set[str] = field(default_factory=set)
    """UIDs of volumes."""
    released: set[str] = field(default_factory=set)
    """UIDs of claims that their users have deleted, whatever the phase still says."""
    checks: int = 0

    def step(self) -> None:
        actions: list[Callable[[], None]] = [
            self.link, self.unlink, self.swap, self.claim, self.release, self.delete_by_hand,
            self.mount, self.unmount, self.write, self.reattach, self.approve, self.take_as_new,
            self.claim, self.release, self.claim, self.release, self.linger, self.linger,
            self.clear_claim, self.clear_claim, self.take_label, self.fail_a_delete,
            self.tend, self.tend, self.claim, self.release,
            self.random.choice([self.restart, self.kill]),
        ]  # fmt: skip
        action = self.random.choice(actions)
        self.done.append(action.__name__)
        action()
        self.look()

    # -- what must hold

    def look(self) -> None:
        """After each operation. A user's hold begins with the first write."""
        volumes = self.volumes()
        for entry, volume in volumes.items():
            disk = self.disk_of(volume)
            if volume.uid not in self.seen and disk is not None:
                self.seen.add(volume.uid)
                self.is_blank_for(entry, disk)
            is_new = volume.uid not in self.holds and claim_uid(volume) not in self.released
            if volume.status.phase == "Bound" and is_new:
                self.use(entry, volume, disk)
        for uid, (name, mark) in self.holds.items():
            self.checks += 1
            found = self.attached[name].read(PLACE, len(mark))
            assert found == mark, f"{name}, in use by {uid}, has lost its data: {self.done}"

    def is_blank_for(self, entry: str, disk: str) -> None:
        self.checks += 1
        found = self.attached[disk].read(PLACE, 64)
        shown = [mark for mark in self.left.get(disk, ()) if found.startswith(mark)]
        assert not shown, f"{entry} is offered with what {shown} left on {disk}: {self.done}"
        users = [uid for uid, (name, _) in self.holds.items() if name == disk]
        assert not users, f"{entry} is offered, and {disk} is in use by {users}: {self.done}"

    def use(self, entry: str, volume: PersistentVolume, disk: str | None) -> None:
        """Its user writes, if the name leads to the disk that the volume is of."""
        path = self.node.entries / entry
        if disk is None or not path.exists() or os.path.realpath(path) != self.attached[disk].path:
            return
        mark = f"data of {volume.uid} {self.random.random()}".encode()
        self.attached[disk].write(mark, PLACE)
        self.holds[volume.uid] = (disk, mark)

    def let_go(self, volume: PersistentVolume) -> None:
        self.released.add(claim_uid(volume))
        held = self.holds.pop(volume.uid, None)
        if held is not None:
            self.left.setdefault(held[0], set()).add(held[1])

    def disk_of(self, volume: PersistentVolume) -> str | None:
        """Which of ours it was made of, as it says."""
        known = identity_of(volume)
        for name, disk in self.attached.items():
            number = disk.number
            sequence = Path(f"/sys/block/{Path(disk.path).name}/diskseq")
            now = (f"{os.major(number)}:{os.minor(number)}", sequence.read_text().strip())
            if known is not None and (known.device, known.disk_sequence) == now:
                return name
        return None

    def volumes(self) -> dict[str, PersistentVolume]:
        """With our label or without."""
        return {
            entry_of(v): v
            for v in self.node.api.list_all(PersistentVolume)
            if v.spec.local is not None and v.spec.local.path.startswith(f"{self.node.entries}/")
        }

    def _any(self, phase: str = "") -> PersistentVolume | None:
        found = self.volumes()
        fit = [e for e, v in found.items() if v.status.phase == (phase or v.status.phase)]
        fit = [entry for entry in fit if entry != HELD]
        return found[self.random.choice(sorted(fit))] if fit else None

    def _entry(self) -> str:
        return f"d{self.random.randrange(DISKS)}"

    def _disk(self) -> str:
        return self.random.choice(sorted(self.attached.keys() - {HELD}))

    # -- what happens

    def link(self) -> None:
        self.node.link(self._entry(), self.attached[self._disk()])

    def unlink(self) -> None:
        (self.node.entries / self._entry()).unlink(missing_ok=True)

    def swap(self) -> None:
        one, other = (self.node.entries / name for name in ("d0", "d1"))
        if one.is_symlink() and other.is_symlink():
            first, second = os.readlink(one), os.readlink(other)  # noqa: PTH115
            self.node.link("d0", second)
            self.node.link("d1", first)

    def claim(self) -> None:
        volume = self._any("Available")
        if volume is not None:
            with suppress(KeyError):  # it has gone meanwhile
                self.node.claim(entry_of(volume))

    def release(self) -> None:
        volume = self._any("Bound")
        reference = volume.spec.claim_ref if volume is not None else None
        if volume is not None and reference is not None:
            self.let_go(volume)
            with suppress(NotFound):
                self.node.api.delete(
                    PersistentVolumeClaim, reference.name, uid=reference.uid,
                    namespace=reference.namespace,
                )  # fmt: skip

    def clear_claim(self) -> None:
        """Back into service as it is, perhaps in the middle of its wipe."""
        volume = self._any("Released")
        if volume is not None:
            patch = {"metadata": {"uid": volume.uid}, "spec": {"claimRef": None}}
            with suppress(KubeError):
                self.node.api.patch(PersistentVolume, volume.name, patch)

    def delete_by_hand(self) -> None:
        volume = self._any()
        if volume is not None:
            self.let_go(volume)
            self.node.delete_volume(volume, gone_is_fine=True)

    def take_label(self) -> None:
        volumes = self.volumes()
        if volumes:
            volume = volumes[self.random.choice(sorted(volumes))]
            patch = {"metadata": {"uid": volume.uid, "labels": {LABEL_NODE: None}}}
            with suppress(KubeError):
                self.node.api.patch(PersistentVolume, volume.name, patch)

    def fail_a_delete(self) -> None:
        self.node.proxy.on("delete", "persistentvolumes", times=1).fail(500)

    def mount(self) -> None:
        point = self.node.entries / "m"
        if not os.path.ismount(point):
            self.node.tmpfs("m")
            (point / "file").write_text("x")

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.node.entries / "m")], check=False, capture_output=True)

    def write(self) -> None:
        self.attached[self._disk()].write(b"data" * 1024, self.random.randrange(8) * MIB)

    def reattach(self) -> None:
        """As pulled and put in again: without ids of its own it is another disk then."""
        name = self._disk()
        disk = self.attached[name]
        if self.random.random() < 0.7:
            return  # it would leave nothing to be used
        try:
            os.close(os.open(disk.path, os.O_RDONLY | os.O_EXCL))
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return
        self.node.disks.detach(disk)
        loop = Path(f"/sys/block/{Path(disk.path).name}/loop")
        wait_until(lambda: not loop.exists(), "nobody has it open any more")
        self.attached[name] = self.node.disks.attach(disk.image)
        self.holds = {uid: held for uid, held in self.holds.items() if held[0] != name}
        self.left.pop(name, None)

    def approve(self) -> None:
        self._ask(Wish.CLEAN, self._shown())

    def take_as_new(self) -> None:
        self._offer(self._shown())

    def tend(self) -> None:
        """As an admin does: each disk at its place, and what is stuck then, and in nobody's hands,
        taken as new."""
        for number in range(DISKS):
            self.node.link(f"d{number}", self.attached[f"a{number}"])
        volumes = self.volumes()
        for entry, shown in self.node.agent.entries().items():
            volume = volumes.get(entry)
            is_stuck = shown["state"] in ("IdentityMismatch", "NeedsAttention", "NeedsApproval")
            if not is_stuck or entry == HELD or (volume and volume.status.phase == "Bound"):
                continue
            if volume is not None:
                self.node.delete_volume(volume, gone_is_fine=True)
                self.node.wait(partial(self._has_no_volume, entry), "the volume is gone")
            self._offer(entry)

    def _has_no_volume(self, entry: str) -> bool:
        return not self.node.agent.entries().get(entry, {}).get("volume")

    def _shown(self) -> str:
        return str(self.random.choice([*sorted(self.node.agent.entries()), "canary"]))

    def _offer(self, entry: str) -> None:
        self._ask(Wish.OFFER, entry)
        # What is there, or was, is offered with what is on it: that is what has been asked for.
        here = os.path.realpath(self.node.entries / entry)
        for name, disk in self.attached.items():
            if disk.path == here or self.last_at(entry) == name:
                self.left.pop(name, None)

    def last_at(self, entry: str) -> str | None:
        volume = self.volumes().get(entry)
        return self.disk_of(volume) if volume is not None else None

    def _ask(self, wish: Wish, entry: str) -> None:
        known = self.node.agent.entries().get(entry, {"uid": "", "disk": ""})
        requests = Requests(self.node.agent.state)
        path = str(self.node.entries / entry)
        requests.add(Request(wish, path, uid=known["uid"], disk=known["disk"]))
        offer = Request(Wish.OFFER, path)
        self.node.wait(lambda: not requests.is_open(offer), "the request is looked at")

    def linger(self) -> None:
        time.sleep(self.random.random())

    def restart(self) -> None:
        self.node.agent.stop()
        self.node.agent.start()

    def kill(self) -> None:
        self.node.agent.kill()
        self.node.agent.start()


def test_users_keep_their_data_and_others_are_left_alone(node: Any, tmp_path: Path) -> None:
    seed = int(os.environ.get("CANARY_SEED", random.randrange(1 << 32)))
    print(f"CANARY_SEED={seed}")
    canary = node.disks.disk("canary", 32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", canary.path], check=True)
    # As foreign disks are: mounted outside, and wrongly linked into our directory as well.
    outside = node.disks.mount(tmp_path / "canary", canary.path)
    (outside / "precious").write_bytes(os.urandom(4 * MIB))
    subprocess.run(["mount", "-o", "remount,ro", str(outside)], check=True)
    # And one that nobody has open, under a name that is none of ours.
    resting = node.disks.disk("resting", 16 * MIB, data=os.urandom(MIB))
    node.link("resting", resting)

    node.class_()
    node.class_("-b")
    node.configure(_={"namePattern": "m"}, b=node.block(namePattern="d*, canary"))
    world = World(node, random.Random(seed))
    for number in range(DISKS):
        world.attached[f"a{number}"] = node.disks.disk(f"a{number}", 16 * MIB, data=b"old" * 100)
        node.link(f"d{number}", world.attached[f"a{number}"])
    world.attached[HELD] = node.disks.disk(HELD, 16 * MIB, data=os.urandom(MIB))
    node.link("canary", canary)
    node.link(HELD, world.attached[HELD])
    node.disks.mount(node.entries / "m-not-ours", "--bind", str(outside))
    node.agent.start()
    held = node.bind(HELD)
    world.look()
    images = (canary, resting, world.attached[HELD])
    before = [digest(image.read()) for image in images]
    for _ in range(OPERATIONS):
        world.step()
    print(f"{OPERATIONS} operations, {world.checks} checks: {' '.join(world.done)}")
    # And one more that is wiped for sure.
    node.proxy.clear()
    last = node.disks.disk("last", data=b"old")
    node.link("d-last", last)
    old = node.bind("d-last")
    node.release("d-last")
    node.volume("d-last", other_than=old.uid)
    assert last.is_blank()
    world.look()
    assert [digest(image.read()) for image in images] == before
    assert world.volumes()[HELD].uid == held.uid


def entry_of(volume: PersistentVolume) -> str:
    assert volume.spec.local is not None
    return Path(volume.spec.local.path).name


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
