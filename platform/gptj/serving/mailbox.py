"""From the engine's thread to an event loop: many items, few wake-ups."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Any, TypeVar

Item = TypeVar("Item")


class Mailbox:
    """Puts items into asyncio queues of one event loop, from any thread.

    A step of the engine has an item for each of its rows. Waking the loop costs a system call,
    so that it is done once for all items that come before the loop has time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._lock = threading.Lock()
        self._woken = False

    def put(self, queue: asyncio.Queue[Item], item: Item) -> None:
        """Any thread may call this. Raises RuntimeError once the loop is closed."""
        with self._lock:
            self._items.append((queue, item))
            wake, self._woken = not self._woken, True
        if wake:
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            items, self._items = self._items, deque()
            self._woken = False
        for queue, item in items:
            queue.put_nowait(item)
