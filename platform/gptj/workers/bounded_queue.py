"""A first-in, first-out queue of bounded length, whose items can be withdrawn while they wait."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Generic, TypeVar

from gptj.workers.errors import ClosedError, QueueFullError

Item = TypeVar("Item")


class BoundedQueue(Generic[Item]):
    """Any thread may call any method; the lock is never held while a model computes.

    Args:
        max_queued: how many items may wait.
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
                    f"{waiting} requests wait already, and {len(items)} more would exceed the "
                    f"limit of {self.max_queued}: try again later"
                )
            self._items.extend(items)
            self._changed.notify()

    def put_back(self, items: Sequence[Item]) -> None:
        """Prepend items that were taken, in this order, whatever the limit."""
        with self._changed:
            self._items.extendleft(reversed(items))

    def peek(self, count: int) -> list[Item]:
        """The first items, at most `count`; they stay in the queue."""
        with self._changed:
            return list(islice(self._items, count))

    def take(self, items: Iterable[Item]) -> list[Item]:
        """Remove those of the items that are still in the queue, and return them."""
        with self._changed:
            return [item for item in items if self._remove(item)]

    def pop(self, count: int) -> list[Item]:
        """Remove the first items, at most `count`, and return them."""
        with self._changed:
            return [self._items.popleft() for _ in range(min(count, len(self._items)))]

    def remove(self, item: Item) -> bool:
        """Withdraw an item; False if it is no longer in the queue."""
        with self._changed:
            return self._remove(item)

    def wait(self, seconds: float) -> None:
        """Return once there is an item or the queue is closed, at the latest after `seconds`."""
        with self._changed:
            if not self._items and not self._closed:
                self._changed.wait(seconds)

    def close(self) -> list[Item]:
        """Accept no more items; empties the queue and returns what was in it."""
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
