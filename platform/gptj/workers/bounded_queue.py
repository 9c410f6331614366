"""A bounded FIFO queue whose waiting items can be withdrawn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Generic, TypeVar

from gptj.workers.errors import ClosedError, QueueFullError

Item = TypeVar("Item")


class BoundedQueue(Generic[Item]):
    """Thread-safe; the lock is never held while a model computes.

    Args:
        max_queued: most items that may wait.
    """

    def __init__(self, max_queued: int) -> None:
        if max_queued < 1:
            raise ValueError(f"max_queued must be 1 or more, got {max_queued}")
        self.max_queued = max_queued
        self._items: deque[Item] = deque()
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def closed(self) -> bool:
        return self._closed

    def put(self, items: Sequence[Item]) -> None:
        """Append all items, or none.

        Raises QueueFullError or ClosedError.
        """
        with self._changed:
            if self._closed:
                raise ClosedError("the queue is closed: the model is shutting down")
            waiting = len(self._items)
            if waiting + len(items) > self.max_queued:
                raise QueueFullError(
                    f"{waiting} requests are already waiting, and {len(items)} more would exceed "
                    f"the limit of {self.max_queued}: try again later"
                )
            self._items.extend(items)
            self._changed.notify()

    def put_back(self, items: Sequence[Item]) -> None:
        """Prepend previously taken items, in this order, regardless of the limit."""
        with self._changed:
            self._items.extendleft(reversed(items))

    def peek(self, count: int) -> list[Item]:
        """The first `count` items at most, without removing them."""
        with self._changed:
            return list(islice(self._items, count))

    def take(self, items: Iterable[Item]) -> list[Item]:
        """Remove and return those of the items that are still in the queue."""
        with self._changed:
            return [item for item in items if self._remove(item)]

    def remove(self, item: Item) -> bool:
        """Remove an item; False if it is no longer in the queue."""
        with self._changed:
            return self._remove(item)

    def wait(self, seconds: float) -> None:
        """Block until there is an item or the queue is closed, at most `seconds`."""
        with self._changed:
            if not self._items and not self._closed:
                self._changed.wait(seconds)

    def close(self) -> list[Item]:
        """Accept no more items; remove and return the remaining ones."""
        with self._changed:
            self._closed = True
            left = list(self._items)
            self._items.clear()
            self._changed.notify()
        return left

    def _remove(self, item: Item) -> bool:
        try:
            self._items.remove(item)
        except ValueError:
            return False
        return True
