"""Awaits the results of a worker thread: all of them, or the first error."""

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
