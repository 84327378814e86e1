"""efs-provisioner: directories as volumes."""
