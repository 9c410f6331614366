"""A FIFO queue, bounded in length and waiting time, whose waiting items can be withdrawn."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Generic, TypeVar

from gptj.workers.errors import ClosedError, QueueFullError

Item = TypeVar("Item")

MEMORY = 32.0  # items by which the pace is known: earlier ones count less and less


class Pace:
    """How long an item waits per item before it, itself included: a mean of recent items."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._turns = 0.0

    def note(self, seconds: float, turns: int) -> None:
        """An item waited so long for its turn, the `turns`-th of those waiting when it came."""
        keep = max(0.0, 1.0 - turns / MEMORY)
        self._seconds = keep * self._seconds + seconds
        self._turns = keep * self._turns + turns

    def expected(self, turns: int) -> float:
        """Seconds until the `turns`-th turn from now; 0 if nothing is known."""
        return turns * self._seconds / self._turns if self._turns else 0.0


class BoundedQueue(Generic[Item]):
    """Thread-safe; the lock is never held while a model computes. Items are told apart by identity.

    Args:
        max_queued: most items that may wait.
        max_seconds: longest that an item may be expected to wait, by the recent pace; None: no
            limit. An empty queue takes any item.
    """

    def __init__(
        self,
        max_queued: int,
        max_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_queued < 1:
            raise ValueError(f"max_queued must be 1 or more, got {max_queued}")
        self.max_queued = max_queued
        self._max_seconds = max_seconds
        self._clock = clock
        self._pace = Pace()
        self._items: deque[Item] = deque()
        self._arrivals: dict[int, tuple[float, int]] = {}  # by id(): the time, and the turn
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
            if self._max_seconds is not None and waiting:
                expected = self._pace.expected(waiting + len(items))
                if expected > self._max_seconds:
                    raise QueueFullError(
                        f"{waiting} requests are already waiting, and another would wait for about "
                        f"{expected:.1f} s, more than the limit of {self._max_seconds:g} s: try "
                        "again later"
                    )
            now = self._clock()
            for turn, item in enumerate(items, waiting + 1):
                self._arrivals[id(item)] = now, turn
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
        """Remove and return those of the items that are still in the queue: it is their turn."""
        with self._changed:
            now = self._clock()
            taken = []
            for item in items:
                arrival = self._arrivals.get(id(item))
                if self._remove(item):
                    taken.append(item)
                    if arrival is not None:  # not put back
                        self._pace.note(now - arrival[0], arrival[1])
            return taken

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
            self._arrivals.clear()
            self._changed.notify()
        return left

    def _remove(self, item: Item) -> bool:
        try:
            self._items.remove(item)
        except ValueError:
            return False
        self._arrivals.pop(id(item), None)
        return True
