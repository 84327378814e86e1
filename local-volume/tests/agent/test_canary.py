"""A file system beside the wiped ones is byte for byte what it was, whatever happens around it.

40 operations by default; ``CANARY_OPERATIONS=1000`` in the environment for the long run.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 1 << 20
OPERATIONS = int(os.environ.get("CANARY_OPERATIONS", "40"))
DISKS = 4


@dataclass
class World:
    """Disks that come, go and change names, and users that claim and release them."""

    node: Any
    random: random.Random
    attached: dict[str, Any] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def step(self) -> None:
        actions: list[Callable[[], None]] = [
            self.link, self.unlink, self.swap, self.claim, self.release, self.delete_by_hand,
            self.mount, self.unmount, self.write, self.reattach, self.approve, self.take_as_new,
            self.claim, self.release, self.random.choice([self.restart, self.kill]),
        ]  # fmt: skip
        action = self.random.choice(actions)
        self.done.append(action.__name__)
        action()

    def _entry(self) -> str:
        return f"d{self.random.randrange(DISKS)}"

    def _disk(self) -> Any:
        return self.attached[self.random.choice(sorted(self.attached))]

    def link(self) -> None:
        self.node.link(self._entry(), self._disk())

    def unlink(self) -> None:
        (self.node.entries / self._entry()).unlink(missing_ok=True)

    def swap(self) -> None:
        one, other = (self.node.entries / name for name in ("d0", "d1"))
        if one.is_symlink() and other.is_symlink():
            first, second = os.readlink(one), os.readlink(other)  # noqa: PTH115
            self.node.link("d0", second)
            self.node.link("d1", first)

    def claim(self) -> None:
        free = [e for e, v in self.node.volumes().items() if v.status.phase == "Available"]
        if free:
            try:
                self.node.claim(self.random.choice(sorted(free)))
            except KeyError:
                self.done.append("(gone)")

    def release(self) -> None:
        bound = [e for e, v in self.node.volumes().items() if v.status.phase == "Bound"]
        if bound:
            self.node.release(self.random.choice(sorted(bound)))

    def delete_by_hand(self) -> None:
        volumes = self.node.volumes()
        if volumes:
            self.node.delete_volume(volumes[self.random.choice(sorted(volumes))], gone_is_fine=True)

    def mount(self) -> None:
        point = self.node.entries / "m"
        if not os.path.ismount(point):
            self.node.tmpfs("m")
            (point / "file").write_text("x")

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.node.entries / "m")], check=False, capture_output=True)

    def write(self) -> None:
        self._disk().write(b"data" * 1024, self.random.randrange(8) * MIB)

    def reattach(self) -> None:
        name = self.random.choice(sorted(self.attached))
        image = self.attached[name].image
        done = subprocess.run(["losetup", "-d", self.attached[name].path], check=False)
        if done.returncode == 0:
            self.node.disks.loops.remove(self.attached[name].path)
            self.attached[name] = self.node.disks.attach(image)

    def approve(self) -> None:
        self._ask("clean")

    def take_as_new(self) -> None:
        self._ask("offer")

    def _ask(self, wish: str) -> None:
        entry = self.random.choice([*self.node.agent.entries(), "canary"])
        self.node.cli(wish, str(self.node.entries / entry), check=False)

    def restart(self) -> None:
        self.node.agent.stop()
        self.node.agent.start()

    def kill(self) -> None:
        self.node.agent.kill()
        self.node.agent.start()


def test_a_canary_beside_the_wiped_ones_stays_as_it_is(node: Any, tmp_path: Path) -> None:
    seed = int(os.environ.get("CANARY_SEED", random.randrange(1 << 32)))
    print(f"CANARY_SEED={seed}")
    canary = node.disks.disk("canary", 32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", canary.path], check=True)
    # As foreign disks are: mounted outside, and wrongly linked into our directory as well.
    outside = node.disks.mount(tmp_path / "canary", canary.path)
    (outside / "precious").write_bytes(os.urandom(4 * MIB))
    subprocess.run(["mount", "-o", "remount,ro", str(outside)], check=True)
    before = digests(canary, outside)

    node.class_()
    node.class_("-b")
    node.configure(_={"namePattern": "m"}, b=node.block(namePattern="d*, canary"))
    world = World(node, random.Random(seed))
    for number in range(DISKS):
        world.attached[f"a{number}"] = node.disks.disk(f"a{number}", 16 * MIB, data=b"old" * 100)
    node.link("canary", canary)
    node.disks.mount(node.entries / "m-not-ours", "--bind", str(outside))
    node.agent.start()
    for _ in range(OPERATIONS):
        world.step()
    print(" ".join(world.done))
    # And one more that is wiped for sure.
    last = node.disks.disk("last", data=b"old")
    node.link("d-last", last)
    old = node.bind("d-last")
    node.release("d-last")
    node.volume("d-last", other_than=old.uid)
    assert last.is_blank()
    assert digests(canary, outside) == before


def digests(canary: Any, outside: Path) -> tuple[str, str]:
    image = hashlib.sha256(canary.read()).hexdigest()
    return image, hashlib.sha256((outside / "precious").read_bytes()).hexdigest()
