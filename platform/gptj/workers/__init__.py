"""Threads that run a model for many callers: bounded queues, heartbeats, batching."""
