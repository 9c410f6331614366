"""What a full or closed queue raises."""

from __future__ import annotations


class QueueFullError(RuntimeError):
    """The queue has no room: try again later."""


class ClosedError(RuntimeError):
    """The worker is shutting down, or has shut down."""
