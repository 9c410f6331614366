"""Batches concurrent callers' items and computes them on one thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
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

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Batcher(Generic[Item, Result]):
    """Calls `compute` with batches of waiting items, and returns each caller its own results.

    Args:
        compute: returns one result for each item, in order.
        max_batch: most items in a batch.
        max_queued: most items waiting, besides the running batch.
    """

    def __init__(
        self,
        name: str,
        compute: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        max_batch: int,
        max_queued: int,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be 1 or more, got {max_batch}")
        self._compute = compute
        self._max_batch = max_batch
        self._queue: BoundedQueue[_Entry[Item, Result]] = BoundedQueue(max_queued)
        self._batch: list[_Entry[Item, Result]] = []
        self._thread = WorkerThread(name, self._queue, self._step, self._fail)
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

    def beat(self) -> None:
        """Report progress from within `compute`."""
        self._thread.beat()

    def close(self) -> None:
        """Stop after the running batch; waiting items fail with ClosedError."""
        for entry in self._queue.close():
            entry.fail(ClosedError("the model was shut down before this request's turn"))
        self._thread.join()

    def _step(self) -> bool:
        self._batch = self._queue.pop(self._max_batch)
        running = [each for each in self._batch if each.future.set_running_or_notify_cancel()]
        if running:
            results = self._compute([entry.item for entry in running])
            for entry, result in zip(running, results, strict=True):
                entry.future.set_result(result)
        return bool(self._batch)

    def _fail(self, error: Exception) -> None:
        for entry in self._batch:
            entry.fail(error)

    def _withdraw(self, entry: _Entry[Item, Result], future: Future[Result]) -> None:
        if future.cancelled():
            self._queue.remove(entry)
