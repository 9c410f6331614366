"""Log the progress of a long conversion."""

from __future__ import annotations

import logging
import time

PROGRESS_SECONDS = 5

logger = logging.getLogger(__name__)


class Progress:
    """Logs, every few seconds and at the end, the bytes done and the estimated time left."""

    def __init__(self, total: int) -> None:
        self._total = total  # bytes
        self._started = self._last = time.monotonic()

    def reach(self, done: int, what: str) -> None:
        """Report that `done` bytes, up to and including `what`, are finished."""
        now = time.monotonic()
        if now - self._last < PROGRESS_SECONDS and done < self._total:
            return
        self._last = now
        passed = now - self._started
        left = passed * (self._total - done) / max(1, done)
        logger.info(
            "%s, %.2f of %.2f GB, %.0f s, %.0f s left",
            what,
            done / 1e9,
            self._total / 1e9,
            passed,
            left,
        )
