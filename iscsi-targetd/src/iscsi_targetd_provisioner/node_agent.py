"""The node-agent: tells the cluster the node's initiator, and ends expansions on the node.

The kubelet has no part for iSCSI volumes that grow while they are used: somebody on the node has to
have the disk rescanned and its file system grown, and to say so in the claim's status.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from external_storage import (
    Agent,
    AgentContext,
    Change,
    Informer,
    PersistentVolume,
    PersistentVolumeClaim,
    ProgramSettings,
    Seconds,
    get_logger,
)
from external_storage.expansion_state import Condition, Do, Status, Step, claim_patch
from external_storage.health import Health
from external_storage.kube.errors import Conflict, KubeError
from external_storage.kube.quantity import from_bytes, to_bytes
from external_storage.kube.request import STRATEGIC_PATCH
from external_storage.kube.types import Node
from iscsi_targetd_provisioner.fleet import ANN_SERVER, OLD_NAME
from iscsi_targetd_provisioner.initiators import ANNOTATION
from iscsi_targetd_provisioner.names import iqn_problem
from iscsi_targetd_provisioner.node_devices import Disk, NodeDevices, NodeError

log = get_logger(__name__)

_TOLD_AGAIN_S = 60.0
"""How often it is looked whether the node still says what we wrote there."""


class NodeAgentSettings(ProgramSettings):
    """Flags and environment of the node-agent."""

    node_name: str = ""
    """Name of the node that it runs on."""

    host_root: Path = Path("/")
    """Where the node's root directory is mounted in the pod."""

    initiator_file: Path = Path("/etc/iscsi/initiatorname.iscsi")
    """File of open-iscsi with the initiator's name, a path on the node."""

    interval: Seconds = Seconds(10.0)
    """How often it is looked whether a volume that waits for its node is used here."""

    def validate(self) -> Iterable[str]:
        yield from super().validate()
        if not self.node_name:
            yield "--node-name: must be given"
        for flag, path in (("host-root", self.host_root), ("initiator-file", self.initiator_file)):
            if not path.is_absolute():
                yield f"--{flag}: {str(path)!r} is not an absolute path"
        if self.interval < 1:
            yield "--interval: must be at least 1 s"


class NodeAgent(Agent[NodeAgentSettings]):
    """Runs on every node that uses iSCSI volumes of iscsi-targetd-provisioner."""

    def __init__(self, settings: NodeAgentSettings, context: AgentContext) -> None:
        super().__init__(settings, context)
        # Not the container's own sysfs: that is read-only where the root file system is.
        root = settings.host_root
        self._devices = NodeDevices(root=root, sys=root / "sys")
        self._claims = Informer(context.client, PersistentVolumeClaim, keep=waits_for_node)
        self._claims.add_handler(self._changed)
        self._finished: set[str] = set()
        """Volumes whose expansion has been ended, perhaps by another node that uses them too."""
        self._told: tuple[str, float] = ("", 0.0)
        """The initiator that the node says, and when we saw it there."""
        self._clock = time.monotonic
        self._wake = threading.Event()
        self._stopping = False
        self._trouble: str | None = None
        self._thread = threading.Thread(target=self._run, name="node-agent", daemon=True)

    # -- life

    def start(self) -> None:
        self._claims.start()
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        self._stopping = True
        self._wake.set()
        self._claims.stop(timeout_s)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def health(self) -> Health:
        ended = "the informer has ended"
        return Health(
            alive={"informer": lambda: ended if self._claims.has_ended else None},
            ready={},
            notes={"node": lambda: self._trouble},
        )

    def _changed(self, change: Change[PersistentVolumeClaim]) -> None:
        if change.old is not None and change.new is None:
            self._finished.add(change.old.spec.volume_name)
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            before, self._trouble = self._trouble, None
            try:
                self.look()
            except (KubeError, NodeError) as error:
                self._trouble = str(error)
                # A node without open-iscsi has nothing new to say every few seconds.
                if before != self._trouble:
                    log.warning("the node cannot be looked after", error=str(error))
            except Exception:
                log.exception("looking after the node failed")
            self._wake.wait(self.settings.interval)

    def look(self) -> None:
        """Do once all there is to do."""
        for claim in self._claims.lister.all():
            try:
                self._finish(claim)
            except Conflict:
                # The watch is about to show what has changed.
                log.debug("the claim has changed", claim=claim.key)
            except (KubeError, NodeError) as error:
                self._trouble = f"claim {claim.key}: {error}"
                log.warning("a volume cannot be grown", claim=claim.key, error=str(error))
                self.context.events.warning(claim, "FileSystemResizeFailed", str(error))
        while self._finished:
            self._follow(self._finished.pop())
        self._tell_initiator()

    # -- the initiator

    def _tell_initiator(self) -> None:
        name = self._devices.initiator(self.settings.initiator_file)
        problem = iqn_problem(name.lower())
        if problem is not None:
            raise NodeError(f"{self.settings.initiator_file}: {problem}")
        told, seen = self._told
        if told == name and self._clock() - seen < _TOLD_AGAIN_S:
            return
        node = self.context.client.get(Node, self.settings.node_name)
        if node.metadata.annotations.get(ANNOTATION) != name:
            patch = {"metadata": {"uid": node.uid, "annotations": {ANNOTATION: name}}}
            self.context.client.patch(Node, node.name, patch)
            log.info("the node's initiator is told", node=node.name, initiator=name)
        self._told = (name, self._clock())

    # -- expansion

    def _finish(self, claim: PersistentVolumeClaim) -> None:
        """End the expansion of a claim whose volume this node is logged in to."""
        volume = self.context.client.find(PersistentVolume, claim.spec.volume_name)
        if volume is None or not _is_ours(volume, claim):
            return
        wanted = to_bytes(volume.spec.capacity.get("storage", "0"))
        disk = self._rescan(volume, wanted)
        if disk is None:
            return
        if _has_file_system(volume) and not self._devices.grow(disk):
            # The kubelet mounts it in a moment.
            return
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.context.client.patch(
            PersistentVolumeClaim,
            claim.name,
            claim_patch(claim, Step(Do.FINISH, wanted), now=now),
            namespace=claim.namespace,
            subresource="status",
            content_type=STRATEGIC_PATCH,
        )
        log.info("volume grown on the node", claim=claim.key, volume=volume.name, disk=disk.name)
        text = f"Volume {volume.name} has {from_bytes(wanted)} on node {self.settings.node_name}"
        self.context.events.normal(claim, "FileSystemResizeSuccessful", text)

    def _follow(self, volume_name: str) -> None:
        """The first node that has the volume ends its expansion: the others have the disk too."""
        volume = self.context.client.find(PersistentVolume, volume_name)
        if volume is None or volume.spec.iscsi is None or not _is_known(volume):
            return
        disk = self._rescan(volume, 0)
        if disk is not None and _has_file_system(volume):
            self._devices.grow(disk)

    def _rescan(self, volume: PersistentVolume, wanted: int) -> Disk | None:
        """The disk as it is now; None if it is not here. ``NodeError``: it has not grown."""
        source = volume.spec.iscsi
        assert source is not None
        disks = [self._devices.rescan(path) for path in self._devices.disks(source.iqn, source.lun)]
        if not disks:
            return None
        multipath = self._devices.multipath_of(disks[0])
        # The map too: multipathd answers before it has grown, and also when it will not.
        small = [disk for disk in (*disks, multipath) if disk is not None and disk.size < wanted]
        if small:
            raise NodeError(
                f"{small[0].name} has {from_bytes(small[0].size)} after a rescan, the volume "
                f"{from_bytes(wanted)}"
            )
        return multipath or disks[0]


def _has_file_system(volume: PersistentVolume) -> bool:
    """One that somebody can grow: what no node may write to stays as it is on its larger disk."""
    source = volume.spec.iscsi
    read_only = source is not None and source.read_only
    read_only = read_only or set(volume.spec.access_modes) == {"ReadOnlyMany"}
    return volume.spec.volume_mode != "Block" and not read_only


def waits_for_node(claim: PersistentVolumeClaim) -> bool:
    """Whether the volume has been grown, and its node has not yet done its part."""
    pending = any(
        condition.type == Condition.NODE_PENDING and condition.status == "True"
        for condition in claim.status.conditions
    )
    state = claim.status.allocated_resource_statuses.get("storage")
    return pending and state in (Status.NODE_PENDING, Status.NODE_IN_PROGRESS)


def _is_ours(volume: PersistentVolume, claim: PersistentVolumeClaim) -> bool:
    reference = volume.spec.claim_ref
    return _is_known(volume) and reference is not None and reference.uid == claim.uid


def _is_known(volume: PersistentVolume) -> bool:
    notes = volume.metadata.annotations
    return volume.spec.iscsi is not None and (ANN_SERVER in notes or OLD_NAME in notes)
