"""Computes a step's masks while the model computes its logits."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Sequence

from gptj.engine.constraints.grammar import GrammarError
from gptj.engine.constraints.token_mask import TokenMask

logger = logging.getLogger(__name__)

MAX_THREADS = 8
PATIENCE_SECONDS = 10.0  # for a mask, which usually takes a millisecond, before it counts as hung


class _Batch:
    """Masks that one thread computes, in order."""

    def __init__(self, masks: Sequence[TokenMask]) -> None:
        self.masks = masks
        self.computed = 0
        self.abandoned = False
        self.done = threading.Event()

    def run(self) -> None:
        for mask in self.masks:
            if self.abandoned:
                return
            try:
                mask.compute()
            # Rust panics are BaseExceptions; only this request fails.
            except BaseException as error:
                logger.exception("a mask failed")
                mask.error = mask.error or GrammarError(f"grammar: it failed: {error}"[:500])
            self.computed += 1
        self.done.set()


class MaskThreads:
    """Threads that compute masks; for use by one thread.

    Daemons, so that one hanging in the library does not keep the program alive.
    """

    def __init__(self) -> None:
        self.wait_seconds = 0.0  # total time in `wait`
        self._count = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 2))
        self._work: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._running = 0
        self._pending: list[_Batch] = []

    def start(self, masks: Sequence[TokenMask]) -> None:
        """Start computing these masks."""
        share = -(-len(masks) // self._count)
        for start in range(0, len(masks), share or 1):
            batch = _Batch(masks[start : start + share])
            self._pending.append(batch)
            if self._running < self._count:
                self._start_thread()
            self._work.put(batch)

    def wait(self) -> None:
        """Return once all started masks are computed or have failed."""
        start = time.perf_counter()
        while self._pending:
            batch = self._pending[0]
            while not batch.done.is_set():
                before = batch.computed
                if batch.done.wait(PATIENCE_SECONDS):
                    break
                if batch.computed == before < len(batch.masks):
                    self._give_up(batch, before)
                    break
            self._pending.remove(batch)
        self.wait_seconds += time.perf_counter() - start

    def close(self) -> None:
        for _ in range(self._running):
            self._work.put(None)
        self._running = 0

    def _give_up(self, batch: _Batch, place: int) -> None:
        """Abandon the thread that hangs on a mask; a new one computes the remaining masks."""
        batch.abandoned = True
        # Not batch.computed, which may change if the thread resumes just now.
        hanging, rest = batch.masks[place], batch.masks[place + 1 :]
        logger.error("a mask took over %s seconds: failing its request", PATIENCE_SECONDS)
        hanging.abandon()
        self._start_thread()
        self.start(rest)

    def _start_thread(self) -> None:
        self._running += 1
        threading.Thread(target=_serve, args=(self._work,), name="masks", daemon=True).start()


def _serve(work: queue.SimpleQueue[_Batch | None]) -> None:
    while (batch := work.get()) is not None:
        batch.run()
