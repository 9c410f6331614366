"""Benchmarks: engine, services, weight loading, perplexity, autoscaling."""
