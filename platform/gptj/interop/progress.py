"""How far a long conversion is: bytes in, lines in the log out."""

from __future__ import annotations

import logging
import time

PROGRESS_SECONDS = 5

logger = logging.getLogger(__name__)


class Progress:
    """Logs every few seconds, and at the end, what is done and the time left at the rate so far."""

    def __init__(self, total: int) -> None:
        self._total = total  # bytes
        self._started = self._last = time.monotonic()

    def reach(self, done: int, what: str) -> None:
        """So many bytes are done, and with them what is named."""
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
