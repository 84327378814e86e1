"""Names, addresses and configuration of a cluster's parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from external_storage.testing.cluster.requirements import CNI_PROGRAMS

NODE: Final = "node-1"
NODE_ADDRESS: Final = "10.77.0.1"
GUEST: Final = "guest"
GUEST_ADDRESS: Final = "10.77.0.2"
NODE_NETWORK: Final = "10.77.0.0/24"
PODS: Final = "10.78.0.0/16"
NODE_PODS: Final = "10.78.1.0/24"
GUEST_PODS: Final = "10.78.2.0/24"
SERVICES: Final = "10.96.0.0/16"
API_SERVICE: Final = "10.96.0.1"
"""The first service address, that of ``kubernetes.default``. It is one of the node's own addresses
and the API server listens on port 443, so that pods reach it also before kube-proxy runs."""
API_PORT: Final = 443
BRIDGE: Final = "nodes"
CONTAINERD: Final = Path("/run/containerd/containerd.sock")
PAUSE_IMAGE: Final = "localhost/pause:1"
TOOLS_IMAGE: Final = "localhost/busybox:1"


def kubelet_configuration(
    *, address: str, cgroup_root: str, certificates: Path
) -> Mapping[str, Any]:
    """The kubelet's file; ``certificates``: where ``ca.crt`` and ``kubelet.{crt,key}`` are."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        # Not 0.0.0.0: that would take the port of every other address of the namespace too.
        "address": address,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(certificates / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(certificates / "kubelet.crt"),
        "tlsPrivateKeyFile": str(certificates / "kubelet.key"),
        "containerRuntimeEndpoint": f"unix://{CONTAINERD}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup_root,
        "failCgroupV1": False,
        "failSwapOn": False,
        "enforceNodeAllocatable": [],
        "localStorageCapacityIsolation": False,
        "makeIPTablesUtilChains": False,
        # A score below the parent's own needs a capability that containers lack.
        "oomScoreAdj": 0,
        # The images cannot be fetched again.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "50Mi"},
        "nodeStatusUpdateFrequency": "5s",
        "syncFrequency": "10s",
    }


def containerd_configuration() -> str:
    """TOML, for containerd 1.6 and later ones that read version 2."""
    return f"""
version = 2
oom_score = 0
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{CNI_PROGRAMS}"
  conf_dir = "/etc/cni/net.d"
"""


def pod_network(subnet: str) -> str:
    """The CNI configuration of one node; ``subnet``: its pods' addresses."""
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": subnet}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "ipam": ipam}
    # A pod reaches itself through its own Service.
    bridge["hairpinMode"] = True
    return json.dumps({"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge]})


def proxy_configuration(*, kubeconfig: Path) -> Mapping[str, Any]:
    """The file of kube-proxy, which runs on ``NODE`` alone: it is the way to Services for all."""
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        # With iptables it needs the match "addrtype", which not every kernel has.
        "mode": "nftables",
        # A guest sends here what is for a Service; the answer must come back the same way.
        "nftables": {"masqueradeAll": True},
        "clusterCIDR": PODS,
        "hostnameOverride": NODE,
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        # These limits are not a namespace's own.
        "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }
