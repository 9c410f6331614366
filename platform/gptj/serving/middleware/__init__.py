"""Middleware of every application: keys, limits, edge cases of HTTP, metrics."""
