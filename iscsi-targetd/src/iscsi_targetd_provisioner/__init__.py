"""iscsi-targetd-provisioner: iSCSI volumes from a storage host, over targetd or over SSH."""
