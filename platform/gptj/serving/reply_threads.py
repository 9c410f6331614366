"""Threads that build and serialize long replies.

They are few, and not those of `asyncio.to_thread`, which tokenize requests: short requests need not
wait for long replies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

MAX_THREADS = 2

P = ParamSpec("P")
T = TypeVar("T")

_threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="reply")


async def in_reply_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Like asyncio.to_thread, in a thread for replies."""
    call = partial(copy_context().run, function, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_threads, call)
