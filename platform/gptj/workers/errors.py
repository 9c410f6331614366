"""Errors of full and closed queues."""

from __future__ import annotations


class QueueFullError(RuntimeError):
    """The queue is full: try again later."""


class ClosedError(RuntimeError):
    """The worker is shutting down, or has shut down."""
