"""Parts of jobs/simulate_autoscaling.py: traffic, replicas, Ray Serve's autoscaler, a report."""
