"""Annotation keys and finalizers of the Kubernetes contract for external provisioners.

They are the same as the Go library's, so that a cluster can switch over without touching a volume.
"""

from __future__ import annotations

ANN_STORAGE_PROVISIONER = "volume.kubernetes.io/storage-provisioner"
ANN_BETA_STORAGE_PROVISIONER = "volume.beta.kubernetes.io/storage-provisioner"
ANN_SELECTED_NODE = "volume.kubernetes.io/selected-node"
ANN_BETA_STORAGE_CLASS = "volume.beta.kubernetes.io/storage-class"

ANN_PROVISIONED_BY = "pv.kubernetes.io/provisioned-by"
ANN_MIGRATED_TO = "pv.kubernetes.io/migrated-to"
ANN_INTENT = "external-storage.dev/provisioning"
"""On a claim: the class and node that its provisioning was begun with, as JSON."""
ANN_GID = "pv.beta.kubernetes.io/gid"

FINALIZER = "external-provisioner.volume.kubernetes.io/finalizer"
INTENT_FINALIZER = "external-storage.dev/provisioning"
"""On a claim: something may have been made for it that no PersistentVolume shows yet."""

LABEL_HOSTNAME = "kubernetes.io/hostname"

ACCESS_MODES = frozenset({"ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"})

BINDING_WAIT = "WaitForFirstConsumer"
MODE_BLOCK = "Block"
PHASE_AVAILABLE = "Available"
PHASE_BOUND = "Bound"
PHASE_FAILED = "Failed"
PHASE_RELEASED = "Released"
POLICY_DELETE = "Delete"
