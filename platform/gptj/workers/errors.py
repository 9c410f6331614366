"""Errors of full and closed queues."""

from __future__ import annotations


class QueueFullError(RuntimeError):
    """The queue is full: try again later.

    Attributes:
        for_one: whether a single item would probably be refused too; otherwise half of the queue is
            empty, and only the number put at once does not fit.
    """

    def __init__(self, message: str, *, for_one: bool = True) -> None:
        super().__init__(message)
        self.for_one = for_one


class ClosedError(RuntimeError):
    """The worker is shutting down, or has shut down."""
