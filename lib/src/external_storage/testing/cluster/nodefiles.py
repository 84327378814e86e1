"""The certificates and the configuration of one node."""

from __future__ import annotations

import json
from pathlib import Path

from external_storage.testing.access import certificate_user, render_kubeconfig
from external_storage.testing.certificates import CertificateAuthority
from external_storage.testing.cluster import layout


def node_files(
    authority: CertificateAuthority,
    *,
    node: str,
    address: str,
    place: Path,
    server: str,
    cgroup_root: str,
) -> dict[str, bytes]:
    """By their names, the files of the kubelet, which will be in ``place``.

    ``server``: the API server's address. ``cgroup_root``: the cgroup that pods are below.
    """
    serving = authority.issue_server((node, address))
    client = authority.issue_client(f"system:node:{node}", group="system:nodes")
    kubelet = layout.kubelet_configuration(
        address=address, cgroup_root=cgroup_root, certificates=place
    )
    ca = authority.certificate
    return {
        "ca.crt": ca,
        "kubelet.crt": serving.certificate,
        "kubelet.key": serving.key,
        "kubelet.json": json.dumps(kubelet).encode(),
        "kubelet.kubeconfig": render_kubeconfig(
            server=server, ca=ca, name="kubelet", user=certificate_user(client)
        ),
    }
