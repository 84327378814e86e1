"""The methods on real devices: what they leave, what they refuse, what a kill does to them."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from local_volume_provisioner import devices, identity
from local_volume_provisioner.cleaning import blocks
from local_volume_provisioner.cleaning.guard import DeviceTask, Refused, exclusively
from local_volume_provisioner.cleaning.machine import Cleaner, CleaningFailed, Limits, Stopped
from local_volume_provisioner.config import ClassConfig, VolumeMode
from local_volume_provisioner.ledger import Ledger, Use
from local_volume_provisioner.methods import Method, MethodKind
from local_volume_provisioner.mounts import MountTable
from local_volume_provisioner.scan import Candidate, Scanner

MIB = 1 << 20
SECRET = b"somebody's data " * 65536
LIMITS = Limits(step_s=60.0, command_s=60.0)


def sh(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "state")
    yield made
    made.close()


@pytest.fixture
def cleaner(ledger: Ledger, tmp_path: Path) -> Cleaner:
    return Cleaner(ledger, LIMITS, str(tmp_path / "run"))


@pytest.fixture
def entries(tmp_path: Path) -> Path:
    made = tmp_path / "entries"
    made.mkdir()
    return made


@pytest.fixture
def found(disks: Any, entries: Path) -> Callable[..., Candidate]:
    """The candidate for a link to this disk."""

    def make(path: str, **fields: Any) -> Candidate:
        link = entries / "disk"
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        return look(entries, "disk", **fields)

    return make


def look(entries: Path, name: str, **fields: Any) -> Candidate:
    fields = {"mode": VolumeMode.BLOCK, **fields}
    config = ClassConfig(name="c", host_dir=str(entries), mount_dir=str(entries), **fields)
    candidate = Scanner().look(config, name, MountTable.read())
    assert isinstance(candidate, Candidate), candidate
    return candidate


def clean(cleaner: Cleaner, candidate: Candidate, **kwargs: Any) -> None:
    kwargs = {"uid": "u1", "claim": "c1", "wanted": lambda: True, **kwargs}
    cleaner.clean(candidate, candidate.class_config, **kwargs)


def task(candidate: Candidate) -> DeviceTask:
    return DeviceTask(candidate.mount_path, candidate.number, candidate.identity)


# -- what each method leaves


@pytest.mark.parametrize("method", ["zero", "overwrite:1", "overwrite:2", "discard"])
def test_no_byte_of_a_user_is_left(
    method: str, disks: Any, found: Callable[..., Candidate], cleaner: Cleaner, ledger: Ledger
) -> None:
    """Of ``discard`` this is so for loop devices, not for all disks."""
    disk = disks.disk("a", 9 * MIB + 512, data=SECRET)
    disk.write(SECRET[:512], 9 * MIB)
    clean(cleaner, found(disk.path, method=Method.parse(method)))
    assert disk.is_blank()
    (record,) = ledger.all()
    assert (record.use, record.uid) == (Use.CLEAN, "u1")


def test_signatures_go_and_data_stays(
    disks: Any, found: Callable[..., Candidate], cleaner: Cleaner
) -> None:
    """L3: what the reference does by default; here it is a choice that says what it does."""
    disk = disks.disk("a", 80 * MIB)
    sh("mkfs.ext4", "-q", disk.path)
    disk.write(SECRET, 20 * MIB)
    method = Method(MethodKind.SIGNATURES)
    clean(cleaner, found(disk.path, method=method))
    probe = subprocess.run(["blkid", "-p", disk.path], capture_output=True, check=False)
    assert probe.stdout == b""
    assert disk.read(20 * MIB, 16) == SECRET[:16]
    assert "STAYS READABLE" in method.leaves


def test_a_new_file_system(disks: Any, found: Callable[..., Candidate], cleaner: Cleaner) -> None:
    disk = disks.disk("a", 32 * MIB)
    sh("mkfs.ext4", "-q", "-U", "11111111-1111-1111-1111-111111111111", disk.path)
    # As its user has left it, with partitions that the kernel knows: they would make it busy.
    partition(disk.path)
    clean(cleaner, found(disk.path, method=Method(MethodKind.REFORMAT), fs_type="ext4"))
    assert found(disk.path).busy == ""
    said = subprocess.run(["blkid", "-p", disk.path], capture_output=True, text=True, check=True)
    assert 'TYPE="ext4"' in said.stdout
    assert "11111111" not in said.stdout


def test_a_command_gets_the_device_that_was_checked(
    disks: Any, found: Callable[..., Candidate], cleaner: Cleaner, tmp_path: Path
) -> None:
    """By a node of its number: no link that is turned meanwhile can lead it elsewhere."""
    disk = disks.disk("a", data=SECRET)
    script = tmp_path / "clean.sh"
    script.write_text(
        '#!/bin/sh\nset -e\nstat -c %t:%T "$LOCAL_PV_BLKDEVICE"\n'
        'test -b "$LOCAL_PV_BLKDEVICE"\nblkdiscard -z "$LOCAL_PV_BLKDEVICE"\n'
    )
    script.chmod(0o755)
    method = Method(MethodKind.COMMAND, 1, (str(script),))
    clean(cleaner, found(disk.path, method=method))
    assert disk.is_blank()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_failing_command_is_told_with_its_last_words(
    disks: Any, found: Callable[..., Candidate], cleaner: Cleaner, ledger: Ledger
) -> None:
    disk = disks.disk("a", data=SECRET)
    command = ("sh", "-c", "echo begun; echo no such luck >&2; exit 3")
    with pytest.raises(CleaningFailed, match="ended with 3: no such luck"):
        clean(cleaner, found(disk.path, method=Method(MethodKind.COMMAND, 1, command)))
    assert ledger.all()[0].use is Use.CLEANING
    assert disk.read(0, 16) == SECRET[:16]


def test_the_partitions_of_a_user_go_with_their_data(
    disks: Any, found: Callable[..., Candidate], cleaner: Cleaner
) -> None:
    disk = disks.disk("a", 16 * MIB)
    candidate = found(disk.path)
    partition(disk.path)
    sh("mkfs.ext4", "-q", f"{disk.path}p1")
    again = look(Path(candidate.mount_path).parent, "disk")
    assert identity.compare(candidate.identity, again.identity).verdict != "different"
    clean(cleaner, again)
    assert disk.is_blank()
    assert not Path(f"{disk.path}p1").exists()


def partition(path: str) -> None:
    table = "label: gpt\nstart=1MiB, size=6MiB\nstart=8MiB, size=6MiB\n"
    subprocess.run(["sfdisk", "-q", "--no-reread", path], input=table, text=True, check=True)
    subprocess.run(["partx", "--update", path], check=True, capture_output=True)


# -- L2: what must not be wiped


def test_what_is_in_use_is_refused(
    disks: Any, found: Callable[..., Candidate], tmp_path: Path
) -> None:
    disk = disks.disk("a", 32 * MIB)
    sh("mkfs.ext4", "-q", disk.path)
    candidate = found(disk.path)

    def refused(why: str) -> None:
        with pytest.raises(Refused, match=why), exclusively(task(candidate)):
            pass

    disks.mount(tmp_path / "m", disk.path)
    refused("in use")
    sh("umount", str(tmp_path / "m"))
    with exclusively(task(candidate)):
        refused("in use")
    loop = disks.attach(Path(disk.path))
    refused(f"in use through {Path(loop.path).name}")
    disks.detach(loop)
    with Path(disk.path).open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused("holds a lock")
    with exclusively(task(candidate)) as descriptor:
        assert os.fstat(descriptor).st_rdev == disk.number


def test_a_device_mounted_in_another_namespace_is_refused(
    disks: Any, found: Callable[..., Candidate], tmp_path: Path
) -> None:
    """A mount that our table does not show, as a pod has it."""
    disk = disks.disk("a", 32 * MIB)
    sh("mkfs.ext4", "-q", disk.path)
    candidate = found(disk.path)
    (tmp_path / "m").mkdir()
    script = f"mount --make-rprivate / && mount {disk.path} {tmp_path}/m && echo ready && read x"
    command = ["unshare", "--mount", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        assert not MountTable.read().using([disk.number])
        with pytest.raises(Refused, match="in use"), exclusively(task(candidate)):
            pass
        holder.communicate(b"\n")


def test_a_disk_with_a_mounted_partition_is_refused(
    disks: Any, found: Callable[..., Candidate], tmp_path: Path
) -> None:
    disk = disks.disk("a")
    candidate = found(disk.path)
    partition(disk.path)
    sh("mkfs.ext4", "-q", f"{disk.path}p2")
    disks.mount(tmp_path / "m", f"{disk.path}p2")
    with pytest.raises(Refused, match="in use"), exclusively(task(candidate)):
        pass
    assert "mounted at" in found(disk.path).busy


def test_a_partition_in_use_as_a_raw_volume_is_refused(
    disks: Any, found: Callable[..., Candidate]
) -> None:
    disk = disks.disk("a")
    candidate = found(disk.path)
    partition(disk.path)
    disks.attach(Path(f"{disk.path}p1"))
    with pytest.raises(Refused, match="in use through loop"), exclusively(task(candidate)):
        pass


def test_a_read_only_device_is_refused(
    disks: Any, found: Callable[..., Candidate], tmp_path: Path
) -> None:
    disk = disks.disk("a", data=SECRET)
    read_only = disks.attach(disk.image, "--read-only")
    candidate = found(read_only.path)
    assert candidate.busy == "it is read-only"
    with pytest.raises(Refused, match=r"cannot be written|read-only"), exclusively(task(candidate)):
        pass


def test_a_link_turned_since_the_decision_is_refused(
    disks: Any, found: Callable[..., Candidate], entries: Path, cleaner: Cleaner
) -> None:
    ours, other = disks.disk("a", data=SECRET), disks.disk("b", data=SECRET)
    candidate = found(ours.path)
    (entries / "disk").unlink()
    (entries / "disk").symlink_to(other.path)
    with pytest.raises(Refused, match="leads to another device"):
        clean(cleaner, candidate)
    (entries / "disk").unlink()
    os.mkfifo(entries / "disk")
    with pytest.raises(Refused, match="no block device any more"):
        clean(cleaner, candidate)
    assert ours.read(0, len(SECRET)) == other.read(0, len(SECRET)) == SECRET


def test_another_disk_under_the_same_number_is_refused(
    disks: Any, found: Callable[..., Candidate], cleaner: Cleaner
) -> None:
    """Same size, same path, same number: only the kernel's sequence number tells."""
    disk = disks.disk("a", data=SECRET)
    candidate = found(disk.path)
    other = disk.image.with_name("other.img")
    other.write_bytes(SECRET.ljust(16 * MIB, b"\0"))
    sh("losetup", "--detach", disk.path)
    sh("losetup", disk.path, str(other))
    with pytest.raises(Refused, match="boot-local id was"):
        clean(cleaner, candidate)
    assert other.read_bytes()[: len(SECRET)] == SECRET


# -- progress


def test_a_wipe_goes_on_after_a_kill_at_every_step(
    disks: Any, found: Callable[..., Candidate], tmp_path: Path
) -> None:
    steps = 4
    size = steps * blocks.STEP[MethodKind.ZERO]
    disk = disks.disk("a", size)
    for offset in range(0, size, size // 16):
        disk.write(SECRET[:4096], offset)
    candidate = found(disk.path)
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[3])
        from test_cleaning import LIMITS, clean, look
        from local_volume_provisioner.cleaning.machine import Cleaner
        from local_volume_provisioner.ledger import Ledger
        entries, state = Path(sys.argv[1]), Path(sys.argv[2])
        seen = []
        def tell(progress):
            seen.append(progress.done)
            print(progress.done, flush=True)
            if len(seen) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        clean(Cleaner(Ledger(state), LIMITS, str(state)), look(entries, "disk"), tell=tell)
        """
    )
    done = []
    for _ in range(steps + 2):
        argv = [str(Path(candidate.mount_path).parent), str(tmp_path / "state")]
        argv.append(str(Path(__file__).parent))
        ran = subprocess.run(
            [sys.executable, "-c", program, *argv], capture_output=True, text=True, check=False
        )
        done += [int(line) for line in ran.stdout.split()]
        if ran.returncode == 0:
            break
        assert ran.returncode == -9, ran.stderr
    step = blocks.STEP[MethodKind.ZERO]
    # Each life goes on where the one before has stopped; the last report is the end of the pass.
    assert done == [step, 2 * step, 3 * step, 4 * step, 4 * step][: len(done)]
    assert disk.is_blank()
    made = Ledger(tmp_path / "state")
    assert made.all()[0].use is Use.CLEAN
    made.close()


def test_progress_of_another_method_or_volume_does_not_count(
    disks: Any, found: Callable[..., Candidate], cleaner: Cleaner, ledger: Ledger
) -> None:
    disk = disks.disk("a", data=SECRET)
    candidate = found(disk.path, method=Method.parse("overwrite:1"))
    clean(cleaner, candidate)
    (record,) = ledger.all()
    stale = msgspec.structs.replace(
        record, use=Use.CLEANING, method="zero", bytes_done=16 * MIB, passes_done=1
    )
    ledger.write([stale])
    disk.write(SECRET)
    clean(cleaner, candidate)
    assert disk.is_blank()


def test_called_off_between_two_steps(
    disks: Any, found: Callable[..., Candidate], cleaner: Cleaner, ledger: Ledger
) -> None:
    disk = disks.disk("a", data=SECRET)
    with pytest.raises(Stopped):
        clean(cleaner, found(disk.path), wanted=lambda: False)
    assert disk.read(0, len(SECRET)) == SECRET
    assert ledger.all()[0].use is Use.CLEANING


def test_the_device_stays_exclusively_ours_between_steps(
    disks: Any, found: Callable[..., Candidate], cleaner: Cleaner, tmp_path: Path
) -> None:
    disk = disks.disk("a")
    codes = []

    def wanted() -> bool:
        codes.append(subprocess.run(["mkfs.ext4", "-q", disk.path], capture_output=True).returncode)
        return True

    clean(cleaner, found(disk.path), wanted=wanted)
    assert 0 not in codes[1:], "somebody else could format it in the middle of a wipe"


def test_devices_show_what_they_are(disks: Any) -> None:
    disk = disks.disk("a")
    partition(disk.path)
    whole, part = devices.read(disk.number), devices.read(Path(f"{disk.path}p1").stat().st_rdev)
    assert whole.size == 16 * MIB
    assert part.parent == whole.number
    assert (part.partition, part.start, part.size) == (1, MIB, 6 * MIB)
    assert part.number in devices.family(whole)
    assert whole.number in devices.family(part)
    other = Path(f"{disk.path}p2").stat().st_rdev
    assert other not in devices.family(part)
