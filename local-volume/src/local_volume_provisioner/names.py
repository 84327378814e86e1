"""Names, labels and annotations of volumes, and sizes as the reference rounds them."""

from __future__ import annotations

import hashlib
import re

DOMAIN = "local-volume.external-storage.dev"
LABEL_NODE = f"{DOMAIN}/node"
"""On each volume: whose it is; the agent watches only what has its own."""
ANN_IDENTITY = f"{DOMAIN}/identity"
"""On each volume: which disk or file system it was made for, as JSON."""
ANN_OWNER_REFERENCE_PREFIX = "local-volume-provisioner-"

_GIB, _MIB = 1 << 30, 1 << 20
_UID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def provisioner_name(node: str, uid: str, *, name_only: bool) -> str:
    """What ``pv.kubernetes.io/provisioned-by`` says: the same as the reference's, for going over
    and back."""
    return f"{ANN_OWNER_REFERENCE_PREFIX}{node}" + ("" if name_only else f"-{uid}")


def is_provisioned_here(annotation: str, node: str) -> bool:
    """Whether a volume was made for this node, by us or the reference, under any of its UIDs: a
    Node object that was made anew is the same machine with the same disks."""
    return bool(
        re.fullmatch(rf"{ANN_OWNER_REFERENCE_PREFIX}{re.escape(node)}(-{_UID})?", annotation)
    )


def node_label(node: str) -> str:
    """The node's name as the value of a label, which has at most 63 characters."""
    if len(node) <= 63:
        return node
    return f"{node[:46].rstrip('-.')}-{hashlib.sha256(node.encode()).hexdigest()[:16]}"


def compatible_name(entry: str, node: str, class_name: str) -> str:
    """The reference's: 32 bits, so that of 10,000 volumes in a cluster 1.2 % of clusters have two
    of one name."""
    value = 0x811C9DC5
    for byte in (entry + node + class_name).encode("utf-8", "surrogateescape"):
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return f"local-pv-{value:x}"


def safe_name(entry: str, node: str, class_name: str) -> str:
    """Readable, and with 80 bits of a digest of the parts, each with its length."""
    parts = (entry, node, class_name)
    text = "".join(f"{len(part)}:{part}" for part in parts)
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:20]
    words = re.sub(r"[^a-z0-9]+", "-", entry.lower()).strip("-")[:40].strip("-")
    return f"local-pv-{words}-{digest}" if words else f"local-pv-{digest}"


def rounded(size: int) -> int:
    """Bytes of capacity for ``size`` bytes: whole GiB from 10 GiB, whole MiB from 10 MiB."""
    for unit in (_GIB, _MIB):
        if size >= 10 * unit:
            return size - size % unit
    return size
