"""Continuous batching of concurrent requests over one model: ids in, ids out."""
