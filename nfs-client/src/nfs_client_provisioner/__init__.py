"""nfs-client-provisioner: volumes as directories on existing NFS servers."""
