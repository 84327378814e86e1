"""Disks that come and go, and real storage on them: XFS quota, LVM thin, iSCSI, NFS."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from external_storage.testing import Disk, Guest, GuestError
from external_storage.testing.processes import ProcessGroup, free_port
from external_storage.testing.waiting import wait_until

MIB = 1024**2
AddDisk = Callable[..., Disk]

GANESHA = """
NFS_CORE_PARAM {{ Protocols = 4; NFS_Port = {port}; Bind_addr = 127.0.0.1;
  Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false; }}
NFSv4 {{ Graceless = true; RecoveryBackend = fs_ng; RecoveryRoot = {root}/recovery;
  Only_Numeric_Owners = true; }}
EXPORT {{ Export_Id = 1; Path = {root}/export; Pseudo = /e; Access_Type = RW; Protocols = 4;
  Squash = No_Root_Squash; SecType = sys; Transports = TCP; FSAL {{ Name = VFS; }} }}
"""


def test_disks_come_with_serial_and_wwn_and_go(guest: Guest, add_disk: AddDisk) -> None:
    plain = add_disk()
    named = add_disk(serial="GUEST-1")
    scsi = add_disk(96 * MIB, serial="GUEST-2", wwn=0x5000C50015EA71AC)
    path = guest.path(scsi)
    links = guest.run("ls /dev/disk/by-id").split()
    assert "virtio-GUEST-1" in links
    assert "wwn-0x5000c50015ea71ac" in links
    assert guest.run(f"cat /sys/block/{Path(path).name}/device/wwid") == "naa.5000c50015ea71ac\n"
    assert guest.run("readlink -f /dev/disk/by-id/virtio-GUEST-1").strip() == guest.path(named)
    assert guest.run(f"blockdev --getsize64 {path}") == f"{96 * MIB}\n"
    assert len({guest.path(disk) for disk in (plain, named, scsi)}) == 3
    for disk in (named, scsi):
        path = guest.path(disk)
        guest.remove_disk(disk)
        assert guest.execute(["test", "-e", path]).returncode == 1
        assert not disk.file.exists()
    assert "virtio-GUEST-1" not in guest.run("ls /dev/disk/by-id || true")


def test_a_disk_can_lack_discard_and_write_zeroes_and_be_read_only(
    guest: Guest, add_disk: AddDisk
) -> None:
    poor, rich = add_disk(write_zeroes=False, discard=False, read_only=True), add_disk()
    facts = "queue/write_zeroes_max_bytes queue/discard_max_bytes ro"

    def facts_of(disk: Disk) -> list[int]:
        folder = f"/sys/block/{Path(guest.path(disk)).name}"
        return [int(word) for word in guest.run(f"cd {folder} && cat {facts}").split()]

    assert facts_of(poor) == [0, 0, 1]
    zeroes, discard, read_only = facts_of(rich)
    assert zeroes > 0
    assert discard > 0
    assert read_only == 0


def test_a_disk_is_pulled_out_while_in_use(guest: Guest, add_disk: AddDisk) -> None:
    disk = add_disk()
    path = guest.path(disk)
    guest.run(f"mkfs.ext4 -q {path} && mkdir -p /mnt/pulled && mount {path} /mnt/pulled")
    guest.remove_disk(disk)
    try:
        assert guest.execute("echo x > /mnt/pulled/x && sync -f /mnt/pulled/x").returncode != 0
    finally:
        guest.run("umount -l /mnt/pulled")


def test_a_file_of_the_host_is_a_disk_and_stays(guest: Guest, tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(b"from the host".ljust(MIB, b"\0"))
    disk = guest.add_disk(image=file, read_only=True)
    try:
        assert guest.run(f"head -c 13 {guest.path(disk)}") == "from the host"
    finally:
        guest.remove_disk(disk)
    assert file.stat().st_size == MIB


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 1000}, "512-byte sectors"),
        ({"bus": "virtio", "wwn": 1}, "a virtio disk has no wwn"),
        ({"bus": "scsi", "write_zeroes": False}, "bus='virtio'"),
        ({"serial": "s" * 21}, "at most 20 characters"),
    ],
)
def test_a_disk_that_cannot_be_had_is_refused(
    guest: Guest, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        guest.add_disk(**options)  # type: ignore[arg-type]


def test_a_disk_fails_by_device_mapper(guest: Guest, add_disk: AddDisk) -> None:
    path = guest.path(add_disk())
    table = f"0 65536 linear {path} 0\\n65536 65536 error\\n"
    guest.run(f"printf '{table}' | dmsetup create half")
    try:
        guest.run("dd if=/dev/mapper/half of=/dev/null bs=4096 count=1")
        read = "dd if=/dev/mapper/half of=/dev/null bs=4096 count=1 skip=8192"
        assert "Input/output error" in guest.execute(read).stderr
    finally:
        guest.run("dmsetup remove half")


def test_xfs_project_quota_holds(guest: Guest, add_disk: AddDisk) -> None:
    path = guest.path(add_disk(512 * MIB))
    guest.run(f"mkfs.xfs -q {path} && mkdir -p /mnt/q && mount -o prjquota {path} /mnt/q")
    try:
        guest.run(
            "mkdir /mnt/q/v && xfs_quota -x -c 'project -s -p /mnt/q/v 7' -c 'limit -p bhard=4m 7' "
            "/mnt/q"
        )
        done = guest.execute("dd if=/dev/zero of=/mnt/q/v/f bs=1M count=8")
        assert "No space left" in done.stderr
    finally:
        guest.run("umount /mnt/q")


def test_a_thin_volume_is_reached_over_iscsi(guest: Guest, add_disk: AddDisk) -> None:
    path = guest.path(add_disk(256 * MIB))
    guest.run(f"vgcreate -q vg-guest {path} && lvcreate -q -y -L 128M -T vg-guest/pool")
    guest.run("lvcreate -q -y -V 64M -T vg-guest/pool -n v1")
    target = "iqn.2024-01.test.external-storage:t1"
    make = f"""
from rtslib_fb import BlockStorageObject, FabricModule, LUN, NetworkPortal, NodeACL, MappedLUN
from rtslib_fb import Target, TPG
store = BlockStorageObject("v1", dev="/dev/vg-guest/v1")
tpg = TPG(Target(FabricModule("iscsi"), "{target}"), 1)
NetworkPortal(tpg, "127.0.0.1", 3260)
lun = LUN(tpg, 0, store)
MappedLUN(NodeACL(tpg, "iqn.2024-01.test.external-storage:guest"), 0, lun)
tpg.set_attribute("authentication", "0")
tpg.enable = True
"""
    node = f"iscsiadm -m node -T {target} -p 127.0.0.1:3260"
    link = f"/dev/disk/by-path/ip-127.0.0.1:3260-iscsi-{target}-lun-0"
    try:
        guest.run(["python3", "-c", make])
        guest.run("iscsiadm -m discovery -t st -p 127.0.0.1:3260")
        guest.run(f"{node} --login && udevadm settle")
        wait_until(lambda: guest.execute(["test", "-b", link]).returncode == 0, "the LUN is there")
        guest.run(f"echo over-iscsi | dd of={link} bs=512 conv=sync oflag=direct")
        assert guest.run("head -c 10 /dev/vg-guest/v1") == "over-iscsi"
    finally:
        guest.run(f"{node} --logout; {node} -o delete", check=False)
        guest.run("targetctl clear && vgremove -q -y vg-guest", check=False)


def test_the_guests_kernel_serves_nfs(guest: Guest) -> None:
    guest.serve_nfs("/srv/one")
    guest.serve_nfs("/srv/two", options="ro,root_squash")
    guest.run("mkdir -p /mnt/n1 /mnt/n2 && echo two > /srv/two/x")
    guest.run(
        "mount -t nfs4 127.0.0.1:/srv/one /mnt/n1 && mount -t nfs4 10.0.2.15:/srv/two /mnt/n2"
    )
    try:
        guest.run("echo one > /mnt/n1/x")
        assert guest.run("cat /srv/one/x /mnt/n2/x") == "one\ntwo\n"
        assert "Read-only file system" in guest.execute("touch /mnt/n2/y").stderr
    finally:
        guest.run("umount /mnt/n1 /mnt/n2", check=False)


def test_the_hosts_ganesha_is_mounted_by_the_guests_kernel(guest: Guest, tmp_path: Path) -> None:
    port = free_port()
    for name in ("export", "recovery"):
        (tmp_path / name).mkdir()
    config = tmp_path / "ganesha.conf"
    config.write_text(GANESHA.format(port=port, root=tmp_path))
    server = ProcessGroup(tmp_path)
    log, pid = tmp_path / "server.log", tmp_path / "pid"
    server.start(
        "ganesha", ["ganesha.nfsd", "-F", "-f", str(config), "-p", str(pid), "-L", str(log)]
    )
    mount = f"mount -t nfs4 -o port={port},vers=4.2,retry=0 {guest.host}:/e /mnt/g"
    try:
        guest.run("mkdir -p /mnt/g")
        wait_until(lambda: guest.execute(mount).returncode == 0, "mounted", explain=log.read_text)
        guest.run("echo seen > /mnt/g/x && chown 1234:5678 /mnt/g/x && umount /mnt/g")
        made = (tmp_path / "export/x").stat()
        assert (tmp_path / "export/x").read_text() == "seen\n"
        assert (made.st_uid, made.st_gid) == (1234, 5678)
    finally:
        guest.run("umount -f -l /mnt/g", check=False)
        server.kill_all()


def test_reboot_and_power_cut_keep_what_they_should() -> None:
    with Guest() as own:
        disk = own.add_disk(64 * MIB, serial="KEPT")
        device = "/dev/disk/by-id/virtio-KEPT"
        own.run(f"mkfs.ext4 -q {device} && mkdir /mnt/d && mount {device} /mnt/d")
        port = own.forward(22)
        program = own.popen(["sleep", "1000"])
        own.run("echo written > /mnt/d/unsynced")

        own.reboot()
        assert program.exit_code == -9
        assert own.forward(22) == port
        own.run(f"mount {device} /mnt/d")
        # Orderly: the file system was unmounted, so what nobody had synced is there.
        assert own.run("cat /mnt/d/unsynced") == "written\n"
        assert "recovery complete" not in own.run("dmesg")

        synced = own.run(
            "dd if=/dev/urandom of=/mnt/d/synced bs=4k count=100 conv=fsync 2>&1; "
            "sync /mnt/d; md5sum < /mnt/d/synced"
        ).splitlines()[-1]
        own.run("echo lost > /mnt/d/lost; echo lost > /root/lost")
        own.power_cut()
        assert not own.running
        with pytest.raises(GuestError, match="QEMU does not run"):
            own.run("true")
        late = own.add_disk(32 * MIB)
        own.start_again()
        own.run(f"mount {device} /mnt/d")
        assert own.run("md5sum < /mnt/d/synced").strip() == synced
        # Written a moment before, and never synced: in a power cut it is lost.
        assert own.execute("cat /mnt/d/lost").returncode != 0
        assert own.path(disk) != own.path(late)
        assert own.run(f"blockdev --getsize64 {own.path(late)}") == f"{32 * MIB}\n"


def test_it_joins_a_network_of_a_namespace() -> None:
    """As the second node of a cluster does: QEMU in a namespace, on a bridge there."""
    from external_storage.testing import Tap

    holder = subprocess.Popen(["unshare", "--net", "--kill-child=KILL", "--fork", "sleep", "1000"])
    try:
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        child = wait_until(lambda: children.read_text().strip(), "the namespace is there")
        enter = ("nsenter", "-t", child, "-n")
        setup = (
            "ip link set lo up && ip link add n0 type bridge && ip address add 10.77.0.1/24 dev n0 "
            "&& ip link set n0 up && ip tuntap add t0 mode tap && ip link set t0 master n0 up"
        )
        subprocess.run([*enter, "sh", "-c", setup], check=True)
        tap = Tap(interface="t0", address="10.77.0.2/24", host="10.77.0.1")
        with Guest(name="node", tap=tap, prefix=enter) as node:
            assert node.run("hostname") == "node\n"
            assert "10.77.0.2/24" in node.run("ip -o address show eth1")
            assert "02:0a:4d:00:02"[3:] in node.run("ip link show eth1")
            banner = subprocess.run(
                [*enter, "ssh-keyscan", "-t", "ed25519", "-T", "60", "10.77.0.2"],
                capture_output=True,
                text=True,
            )
            known = node.run("cat /etc/ssh/ssh_host_ed25519_key.pub").split()[1]
            assert known in banner.stdout
    finally:
        holder.kill()
        holder.wait()
