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

MEMORY = 32  # items that the expected wait averages over, at least; older ones weigh less and less
TURNS = 8  # turns that the usual number of items per turn averages over


class WaitEstimate:
    """How long items wait for room, by a mean of the last `memory` items."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._seconds = 0.0
        self._items = 0.0

    def note(self, seconds: float, items: int) -> None:
        """Record that `items` were taken, `seconds` after the previous turn."""
        keep = max(0.0, 1.0 - items / self._memory)
        self._seconds = keep * self._seconds + seconds
        self._items = keep * self._items + items

    def expected(self, items: int) -> float:
        """Seconds until `items` more have been taken; 0 if nothing is known."""
        return max(0, items) * self._seconds / self._items if self._items else 0.0


class BoundedQueue(Generic[Item]):
    """Thread-safe; the lock is never held while a model computes.

    Args:
        max_queued: most items that may wait.
        max_seconds: longest that an item may be expected to wait for others before it, by the
            recent waits; None: no limit. An empty queue takes any item.
        at_once: most items that a turn takes, however many are running; items of the next turn do
            not count as waiting for others. 0: as many as `room`.
        room: returns how many items could be taken now; called only while no item waits for room.
        together: most items that may end, and so make room, at the same time.
    """

    def __init__(
        self,
        max_queued: int,
        max_seconds: float | None = None,
        at_once: int = 0,
        room: Callable[[], int] = lambda: 0,
        together: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_queued < 1:
            raise ValueError(f"max_queued must be 1 or more, got {max_queued}")
        self.max_queued = max_queued
        self._max_seconds = max_seconds
        self._room = room
        self._clock = clock
        self._wait = WaitEstimate(max(MEMORY, together))
        self._at_once = self._usual_turn = float(at_once)
        self._full_since: float | None = None  # the last turn's end, if there was no room for all
        self._taken = 0  # in the present turn
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
                    f"the limit of {self.max_queued}: try again later",
                    for_one=waiting >= self.max_queued // 2,
                )
            if self._max_seconds is not None:
                self._check_wait(waiting, self._max_seconds)
            self._items.extend(items)
            self._changed.notify()

    def _check_wait(self, waiting: int, limit: float) -> None:
        """QueueFullError if the next item would wait too long; any put with it may wait longer."""
        room = 0 if self._full_since is not None else self._room()
        if not waiting:
            if room < 1 and not self._at_once:
                self._full_since = self._clock()
            return
        expected = self._wait.expected(waiting + 1 - max(room, round(self._usual_turn)))
        if expected > limit:
            raise QueueFullError(
                f"{waiting} requests are already waiting, and another would wait for about "
                f"{expected:.1f} s, more than the limit of {limit:g} s: try again later"
            )

    def put_back(self, items: Sequence[Item]) -> None:
        """Prepend previously taken items, in this order, regardless of the limit."""
        with self._changed:
            self._items.extendleft(reversed(items))

    def peek(self, count: int) -> list[Item]:
        """The first `count` items at most, without removing them."""
        with self._changed:
            return list(islice(self._items, count))

    def take(self, items: Iterable[Item]) -> list[Item]:
        """Remove and return those of the items that are still in the queue: it is their turn.

        After one or several calls the caller must call `end_turn`.
        """
        with self._changed:
            taken = [item for item in items if self._remove(item)]
            self._taken += len(taken)
            return taken

    def end_turn(self) -> None:
        """No more items are taken this turn; those that are left wait for room."""
        with self._changed:
            now, taken = self._clock(), self._taken
            if taken and self._full_since is not None:
                seconds = now - self._full_since
                # A turn that takes all might have taken more.
                if self._items or seconds < self._wait.expected(taken):
                    self._wait.note(seconds, taken)
            if not self._items:
                self._full_since = None
            elif taken or self._full_since is None:
                self._full_since = now
            if taken and self._items:
                usual = self._usual_turn + (taken - self._usual_turn) / TURNS
                self._usual_turn = min(usual, self._at_once)
            self._taken = 0

    def remove(self, item: Item) -> bool:
        """Remove an item; False if it is no longer in the queue."""
        with self._changed:
            removed = self._remove(item)
            if not self._items:
                self._full_since = None
            return removed

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
