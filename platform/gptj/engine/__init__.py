"""Continuous batching of many callers' requests over one model: ids in, ids out."""
