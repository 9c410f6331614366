"""A simulation of Ray Serve's autoscaling: traffic, replicas, the autoscaler, a report."""
