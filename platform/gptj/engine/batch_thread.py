"""One thread that takes waiting items in batches: the model's work, off its callers' threads."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.5  # how often a thread without work shows that it lives
CLOSE_SECONDS = 60  # for the step that is running
MAX_FAILED_BATCHES = 3  # in a row: after a GPU's error, say, none will ever succeed again

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFullError(RuntimeError):
    """So many items wait already that a new one would wait too long: try again later."""


class ClosedError(RuntimeError):
    """The thread has ended, or ends: it takes no more work."""


class BatchThread(Generic[Item]):
    """Runs `run` on batches of items, in the order in which they came.

    Args:
        name: of the thread, for logs and profilers.
        run: works on a batch, in the thread; it calls `beat` when it advances.
        fail: gets each item of a batch whose `run` raised, with the error, and each item that
            waits when the thread is closed.
        max_batch: items of a batch.
        max_queued: items that may wait, beside those of the running batch.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[list[Item]], None],
        fail: Callable[[Item, Exception], None],
        *,
        max_batch: int,
        max_queued: int,
    ) -> None:
        if max_batch < 1 or max_queued < 1:
            raise ValueError(
                f"max_batch and max_queued must be 1 or more, got {max_batch} and {max_queued}"
            )
        self._run = run
        self._fail = fail
        self._max_batch = max_batch
        self._max_queued = max_queued
        self._waiting: deque[Item] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._last_beat = time.monotonic()
        self._failed_batches = 0  # since the last that went well
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def put(self, *items: Item) -> None:
        """Let items wait for a batch: all of them, or none.

        Raises QueueFullError or ClosedError.
        """
        with self._changed:
            if self._closed:
                raise ClosedError("the engine is closed")
            waiting = len(self._waiting)
            if waiting + len(items) > self._max_queued:
                raise QueueFullError(
                    f"{waiting} requests wait already, and {len(items)} more would exceed the "
                    f"limit of {self._max_queued}: try again later"
                )
            self._waiting.extend(items)
            self._changed.notify()

    def remove(self, item: Item) -> bool:
        """Take an item back; False if it no longer waits."""
        with self._changed:
            try:
                self._waiting.remove(item)
            except ValueError:
                return False
            return True

    def beat(self) -> None:
        """Say that the work advances."""
        self._last_beat = time.monotonic()

    def alive(self, within_seconds: float) -> bool:
        """Whether the work has advanced, or there was none, within so many seconds.

        Not once MAX_FAILED_BATCHES in a row have failed.
        """
        if self._failed_batches >= MAX_FAILED_BATCHES:
            return False
        return self._thread.is_alive() and time.monotonic() - self._last_beat < within_seconds

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """End the thread after the batch that it works on; what waits fails with ClosedError."""
        with self._changed:
            self._closed = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for item in left:
            self._fail(item, ClosedError("the engine was closed before this request's turn"))
        self._thread.join(CLOSE_SECONDS)

    def _loop(self) -> None:
        while batch := self._next_batch():
            try:
                self._run(batch)
                self._failed_batches = 0
            # Whatever went wrong ends these items only: the others' turn comes.
            except Exception as error:
                logger.exception("a batch of %d failed", len(batch))
                self._failed_batches += 1
                for item in batch:
                    self._fail(item, error)

    def _next_batch(self) -> list[Item]:
        """The items whose turn it is, as soon as there are any; none: the end."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait(IDLE_SECONDS)
                self.beat()
            self.beat()
            return [
                self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))
            ]


class Batcher(Generic[Item, Result]):
    """Calls `compute` with the items that wait, and gives each caller its own result.

    Args:
        compute: as many results as items, in their order.
        max_batch, max_queued: as for BatchThread.
    """

    def __init__(
        self,
        name: str,
        compute: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        max_batch: int,
        max_queued: int,
    ) -> None:
        self._compute = compute
        self._thread: BatchThread[tuple[Item, Future[Result]]] = BatchThread(
            name, self._run, _set_error, max_batch=max_batch, max_queued=max_queued
        )

    def submit(self, items: Sequence[Item]) -> list[Future[Result]]:
        """The future results of items; cancelling one takes it back while it waits.

        Raises QueueFullError (then no item waits) or ClosedError.
        """
        entries: list[tuple[Item, Future[Result]]] = [(item, Future()) for item in items]
        for entry in entries:
            entry[1].add_done_callback(partial(self._forget, entry))
        self._thread.put(*entries)
        return [future for _, future in entries]

    def alive(self, within_seconds: float) -> bool:
        """Whether the thread computes, or waits for work: see BatchThread."""
        return self._thread.alive(within_seconds)

    def beat(self) -> None:
        """Say that `compute` advances."""
        self._thread.beat()

    def close(self) -> None:
        self._thread.close()

    def _run(self, batch: list[tuple[Item, Future[Result]]]) -> None:
        wanted = [entry for entry in batch if entry[1].set_running_or_notify_cancel()]
        if not wanted:
            return
        results = self._compute([item for item, _ in wanted])
        assert len(results) == len(wanted)
        for (_, future), result in zip(wanted, results, strict=True):
            future.set_result(result)

    def _forget(self, entry: tuple[Item, Future[Result]], future: Future[Result]) -> None:
        if future.cancelled():
            self._thread.remove(entry)


def _set_error(entry: tuple[object, Future[Result]], error: Exception) -> None:
    if not entry[1].done():
        entry[1].set_exception(error)
