"""Threads that build and serialize replies.

Long ones have a few threads of their own, apart from those of `asyncio.to_thread`, which tokenize
requests and build short replies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

MAX_THREADS = 2
LONG = 5_000  # numbers of a reply: 50 ms

P = ParamSpec("P")
T = TypeVar("T")

_threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="reply")


async def in_reply_thread(
    numbers: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Like asyncio.to_thread, for a function of a reply with so many logprobs or other numbers."""
    call = partial(copy_context().run, function, *args, **kwargs)
    executor = _threads if numbers > LONG else None
    return await asyncio.get_running_loop().run_in_executor(executor, call)
