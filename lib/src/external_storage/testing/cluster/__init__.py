"""A Kubernetes cluster for tests, on one machine and seen by nobody else on it: ``Cluster``.

The control plane of ``ControlPlane`` with kube-scheduler, containerd, runc, a kubelet and
kube-proxy in namespaces of their own. Pods run, with images that a test has loaded; Services,
probes, logs, exec, volumes, mount propagation and drains work as everywhere. A QEMU guest may join
as a second node, for volumes that need a kernel with NFS or iSCSI.

``namespaces`` makes the node's place on this machine; in it runs ``init`` as the first process,
beside it ``janitor`` waits to clean up. Linux, root, and the Debian packages that ``requirements``
names.
"""

from __future__ import annotations

from external_storage.testing.cluster.cluster import Cluster
from external_storage.testing.cluster.requirements import ClusterError

__all__ = ["Cluster", "ClusterError"]
