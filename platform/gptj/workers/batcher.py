"""Batches concurrent callers' items and computes them on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from gptj.workers.bounded_queue import BoundedQueue
from gptj.workers.errors import ClosedError
from gptj.workers.worker_thread import WorkerThread

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Entry(Generic[Item, Result]):
    item: Item
    future: Future[Result]
    since: float = field(default_factory=time.monotonic)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(frozen=True)
class BatchTimes:
    """Of one batch, in seconds."""

    queued: list[float]  # of each item, until the batch began
    computing: float


class Batcher(Generic[Item, Result]):
    """Calls `compute` with batches of waiting items, and returns each caller its own results.

    Args:
        compute: returns one result for each item, in order.
        max_batch: most items in a batch.
        max_queued: most items waiting, besides the running batch.
        max_queue_seconds: longest that an item may be expected to wait for others, besides the
            running batch and the next; None: no limit.
        cost: of an item.
        max_cost: of a batch; an item above it is a batch of its own. None: no limit.
        observe: called after each batch, on the worker's thread.
        finish: called on that thread before it ends.
    """

    def __init__(
        self,
        name: str,
        compute: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        max_batch: int,
        max_queued: int,
        max_queue_seconds: float | None = None,
        cost: Callable[[Item], int] = lambda item: 1,
        max_cost: int | None = None,
        observe: Callable[[Sequence[Item], BatchTimes], None] = lambda items, times: None,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be 1 or more, got {max_batch}")
        self._compute = compute
        self._max_batch = max_batch
        self._cost = cost
        self._max_cost = max_cost
        self._observe = observe
        self._queue: BoundedQueue[_Entry[Item, Result]] = BoundedQueue(
            max_queued, max_queue_seconds, at_once=max_batch, together=max_batch
        )
        self._batch: list[_Entry[Item, Result]] = []
        self._thread = WorkerThread(name, self._queue, self._step, self._fail, finish=finish)
        self._thread.start()

    def submit(self, items: Sequence[Item]) -> list[Future[Result]]:
        """Queue all items; cancelling a future withdraws its item if it is still waiting.

        Raises QueueFullError (then none is queued) or ClosedError.
        """
        entries: list[_Entry[Item, Result]] = [_Entry(item, Future()) for item in items]
        for entry in entries:
            entry.future.add_done_callback(partial(self._withdraw, entry))
        self._queue.put(entries)
        return [entry.future for entry in entries]

    def alive(self, within_seconds: float) -> bool:
        """See WorkerThread.alive."""
        return self._thread.alive(within_seconds)

    def heartbeat(self) -> None:
        """Report progress from within `compute`."""
        self._thread.heartbeat()

    def close(self) -> None:
        """Stop after the running batch; waiting items fail with ClosedError."""
        for entry in self._queue.close():
            entry.fail(ClosedError("the model was shut down before this request's turn"))
        self._thread.join()

    def _step(self) -> bool:
        self._batch = self._queue.take(list(self._next()))
        self._queue.end_turn()
        running = [each for each in self._batch if each.future.set_running_or_notify_cancel()]
        if running:
            items = [entry.item for entry in running]
            start = time.monotonic()
            results = self._compute(items)
            end = time.monotonic()
            for entry, result in zip(running, results, strict=True):
                entry.future.set_result(result)
            times = BatchTimes([start - entry.since for entry in running], end - start)
            self._observe(items, times)
        return bool(self._batch)

    def _next(self) -> Iterator[_Entry[Item, Result]]:
        """The first waiting entries that make a batch."""
        total = 0
        for number, entry in enumerate(self._queue.peek(self._max_batch)):
            total += self._cost(entry.item)
            if number and self._max_cost is not None and total > self._max_cost:
                return
            yield entry

    def _fail(self, error: Exception) -> None:
        for entry in self._batch:
            entry.fail(error)

    def _withdraw(self, entry: _Entry[Item, Result], future: Future[Result]) -> None:
        if future.cancelled():
            self._queue.remove(entry)
