"""Errors of full and closed queues."""

from __future__ import annotations


class QueueFullError(RuntimeError):
    """The queue is full: try again later.

    Attributes:
        for_one: probably even for a single item; otherwise half of the queue is empty, and only as
            many as were put at once do not fit.
    """

    def __init__(self, message: str, *, for_one: bool = True) -> None:
        super().__init__(message)
        self.for_one = for_one


class ClosedError(RuntimeError):
    """The worker is shutting down, or has shut down."""
