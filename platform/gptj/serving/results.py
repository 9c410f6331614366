"""Awaits the results of threads: all of a request's, or one that several requests share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TypeVar

from gptj.serving.errors import ModelError
from gptj.workers.errors import ClosedError

Result = TypeVar("Result")


async def results_of(futures: Sequence[Future[Result]]) -> list[Result]:
    """The results in order; cancelling the call withdraws work that has not started.

    Raises ClosedError, or ModelError for any other error in the thread.
    """
    try:
        return await asyncio.gather(*map(asyncio.wrap_future, futures))
    except ClosedError:
        raise
    except Exception as error:
        raise ModelError(f"the model failed on this request: {error}") from error
    finally:
        for future in futures:
            future.cancel()


async def shared_result(future: Future[Result]) -> Result:
    """The result of work that others may wait for too: cancelling the call leaves it running."""
    waiter = asyncio.wrap_future(future)
    waiter.add_done_callback(_retrieve)
    return await asyncio.shield(waiter)


def _retrieve(future: asyncio.Future[Result]) -> None:
    """Note an error as seen: asyncio logs those that nobody waits for, as lost."""
    if not future.cancelled():
        future.exception()
