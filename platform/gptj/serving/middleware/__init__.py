"""What wraps every application: keys, limits, the edge of HTTP, metrics."""
