"""Threads that build and serialize replies.

They do nothing else, so that no request's text or template keeps a reply waiting, and long replies
have threads of their own, so that short ones do not wait for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

MAX_THREADS = 2  # of long replies, and as many of short ones
LONG = 5_000  # numbers of a reply: 50 ms

P = ParamSpec("P")
T = TypeVar("T")

_short = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="short reply")
_long = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="long reply")


async def in_reply_thread(
    numbers: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Like asyncio.to_thread, for a function of a reply with so many logprobs or other numbers."""
    call = partial(copy_context().run, function, *args, **kwargs)
    executor = _long if numbers > LONG else _short
    return await asyncio.get_running_loop().run_in_executor(executor, call)
