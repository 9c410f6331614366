"""Runs in Serve's proxy, before the replicas: connections, admission, failover."""
