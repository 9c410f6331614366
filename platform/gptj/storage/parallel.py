"""Run an I/O-bound action on many items in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

PARALLEL = 16  # concurrent requests
PART_BYTES = 16 * 2**20  # of a large transfer; several parts are in flight at once

Item = TypeVar("Item")


def for_each(action: Callable[[Item], Any], items: Iterable[Item], at_once: int = PARALLEL) -> None:
    """Call `action` on every item, `at_once` in parallel; stop at the first error and raise it."""
    work = list(items)
    if len(work) == 1:
        action(work[0])
    elif work:
        with ThreadPoolExecutor(min(at_once, len(work))) as pool:
            futures = [pool.submit(action, item) for item in work]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
