"""The queue between callers' threads and the engine's: in order of arrival, of bounded length."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from itertools import islice

from gptj.engine.batch_thread import ClosedError, QueueFullError
from gptj.engine.request import Request


class WaitingQueue:
    """Requests that wait for the engine, and cancellations of those that no longer do.

    Its lock is held for moments only, never while the engine computes.
    """

    def __init__(self, max_queued: int) -> None:
        if max_queued < 1:
            raise ValueError(f"max_queued must be 1 or more, got {max_queued}")
        self.max_queued = max_queued
        self.closed = False
        self.cancellations = 0  # of requests while they waited
        self._requests: deque[Request] = deque()
        self._cancelled: list[Request] = []  # while they ran
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._requests)

    def put(self, requests: Sequence[Request]) -> None:
        """Let requests wait: all of them, or none.

        Raises QueueFullError or ClosedError.
        """
        with self._changed:
            if self.closed:
                raise ClosedError("the engine is closed")
            waiting = len(self._requests)
            if waiting + len(requests) > self.max_queued:
                raise QueueFullError(
                    f"{waiting} requests wait already, and {len(requests)} more would exceed the "
                    f"limit of {self.max_queued}: try again later"
                )
            for request in requests:
                request.waiting = True
            self._requests.extend(requests)
            self._changed.notify()

    def put_back(self, requests: Sequence[Request]) -> None:
        """Let requests that had their turn wait again, before all others and in this order."""
        with self._changed:
            for request in reversed(requests):
                request.waiting = True
                self._requests.appendleft(request)

    def head(self, count: int) -> list[Request]:
        """The first request, and up to count - 1 of its group behind it; they go on waiting."""
        with self._changed:
            requests = list(islice(self._requests, count))
        if not requests or requests[0].group is None:
            return requests[:1]
        return [request for request in requests if request.group == requests[0].group]

    def take(self, head: Sequence[Request]) -> list[Request]:
        """Those of the first requests that still wait: they do so no longer."""
        with self._changed:
            taken = [request for request in head if request.waiting]
            for request in taken:
                request.waiting = False
                self._requests.remove(request)
        return taken

    def cancel(self, request: Request) -> bool:
        """Take a request back, or tell the engine at its next step (then False)."""
        with self._changed:
            if request.waiting:
                request.waiting = False
                self._requests.remove(request)
                self.cancellations += 1
                return True
            if not request.ended:
                self._cancelled.append(request)
            return False

    def cancelled(self) -> list[Request]:
        """Requests that were cancelled while they ran; each is told once."""
        if not self._cancelled:
            return []
        with self._changed:
            cancelled, self._cancelled = self._cancelled, []
        return cancelled

    def wait(self, seconds: float) -> None:
        """Return when there is a request or the queue is closed, or after so many seconds."""
        with self._changed:
            if not self._requests and not self.closed:
                self._changed.wait(seconds)

    def close(self) -> list[Request]:
        """Take no more requests; those that wait are taken out."""
        with self._changed:
            self.closed = True
            left = list(self._requests)
            for request in left:
                request.waiting = False
            self._requests.clear()
            self._changed.notify()
        return left
