"""A thread that runs a model step by step and reports whether it makes progress."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from gptj.workers.bounded_queue import BoundedQueue

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.5  # between heartbeats of an idle thread
CLOSE_SECONDS = 60  # for the step in progress
MAX_FAILED_STEPS = 3  # in a row: after a GPU error, for example, no later step can succeed


class WorkerThread:
    """Calls `step` while there is work, until its queue is closed.

    Args:
        name: of the thread, for logs and profilers.
        queue: work waiting for the thread.
        step: does some of the work; returns whether it computed anything.
        recover: handles a step's exception; if it raises too, the thread counts as dead.
        busy: whether there is work besides the queue's.
        finish: called on the thread before it ends.
    """

    def __init__(
        self,
        name: str,
        queue: BoundedQueue[Any],
        step: Callable[[], bool],
        recover: Callable[[Exception], None],
        *,
        busy: Callable[[], bool] = lambda: False,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = name
        self._queue = queue
        self._step = step
        self._recover = recover
        self._busy = busy
        self._finish = finish
        self._last_beat = time.monotonic()
        self._failed_steps = 0  # since the last success
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def heartbeat(self) -> None:
        """Report progress; long steps call this themselves."""
        self._last_beat = time.monotonic()

    def alive(self, within_seconds: float) -> bool:
        """Whether the thread made progress or was idle within the last `within_seconds`.

        False once MAX_FAILED_STEPS in a row have failed.
        """
        if self._failed_steps >= MAX_FAILED_STEPS:
            return False
        return self._thread.is_alive() and time.monotonic() - self._last_beat < within_seconds

    def join(self) -> None:
        """Wait for the running step; call after closing the queue."""
        self._thread.join(CLOSE_SECONDS)

    def _loop(self) -> None:
        while not self._queue.closed:
            self.heartbeat()
            if not len(self._queue) and not self._busy():
                self._queue.wait(IDLE_SECONDS)
                continue
            try:
                if self._step():
                    self._failed_steps = 0
            # A failed step fails only its own requests.
            except Exception as error:
                logger.exception("%s: a step failed", self._name)
                self._failed_steps += 1
                self._try_to_recover(error)
        self._finish()

    def _try_to_recover(self, error: Exception) -> None:
        try:
            self._recover(error)
        except Exception:
            logger.exception("%s: cannot recover from a failed step", self._name)
            self._failed_steps = MAX_FAILED_STEPS
