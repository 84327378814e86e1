"""nfs-provisioner: volumes as directories, served by a supervised NFS-Ganesha."""
