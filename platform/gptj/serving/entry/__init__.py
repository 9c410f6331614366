"""What stands before the replicas, in Serve's proxy: connections, admission, tries."""
