"""new-store-provisioner: directories as volumes."""
