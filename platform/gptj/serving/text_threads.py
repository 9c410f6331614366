"""Threads that tokenize requests' texts and render their chat templates.

Long texts, and chats whose templates are slow, have threads of their own, so that others do not
wait for them, and a bound on how many may wait. The tokenizer's library holds no lock of Python's
while it encodes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

from gptj.chat import SlowTemplateError
from gptj.serving.errors import SCOPE, OverloadedError

SHORT_THREADS = 4
LONG_THREADS = 2
LONG = 2**15  # characters or ids of a request: 50 ms
SLOW = 2**62  # characters that stand for a chat whose template is slow
MAX_WAITING = 2**23  # characters of long texts that wait for a thread: 8 s of a core
MAX_SLOW_WAITING = 8  # chats with slow templates that wait for theirs: 16 s of a core at most

P = ParamSpec("P")
T = TypeVar("T")


_of_thread = threading.local()


def _mark_slow() -> None:
    _of_thread.is_slow = True


def _mark_quick() -> None:
    _of_thread.is_slow = False


def in_quick_thread() -> bool:
    """Whether this is a thread that chats with slow templates must leave to others."""
    return not getattr(_of_thread, "is_slow", True)


class TextThreads:
    """Threads for short texts, for long ones, and for chats with slow templates.

    Args:
        max_waiting: most characters of long texts that wait; a text above it may wait alone.
        max_slow_waiting: most chats with slow templates that wait.
    """

    def __init__(
        self, max_waiting: int = MAX_WAITING, max_slow_waiting: int = MAX_SLOW_WAITING
    ) -> None:
        self._short = ThreadPoolExecutor(SHORT_THREADS, "short text", _mark_quick)
        self._long = _Lane(
            ThreadPoolExecutor(LONG_THREADS, "long text", _mark_quick),
            max_waiting,
            "long texts of {waiting} characters wait to be tokenized, and {size} more would exceed "
            "the limit of {limit}: try again later",
        )
        self._slow = _Lane(
            ThreadPoolExecutor(1, "slow template", _mark_slow),
            max_slow_waiting,
            "{waiting} chats with slow templates wait to be rendered, and {size} more would exceed "
            "the limit of {limit}: try again later",
        )

    async def run(
        self, characters: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Like asyncio.to_thread, for a function of a text with so many characters or ids.

        Cancelling the call gives up its place among those that wait. Raises OverloadedError if too
        many long texts, or chats with SLOW templates, do.
        """
        call = partial(copy_context().run, function, *args, **kwargs)
        if characters >= SLOW:
            return await asyncio.wrap_future(self._slow.submit(1, call))
        if characters > LONG:
            return await asyncio.wrap_future(self._long.submit(characters, call))
        return await asyncio.wrap_future(self._short.submit(call))


class _Lane:
    """Threads for which only so much may wait.

    Args:
        limit: of the sizes that wait; one above it may wait alone.
        refusal: with the fields waiting, size and limit.
    """

    def __init__(self, pool: ThreadPoolExecutor, limit: int, refusal: str) -> None:
        self._pool = pool
        self._limit = limit
        self._refusal = refusal
        self._waiting = 0
        self._lock = threading.Lock()

    def submit(self, size: int, call: Callable[[], T]) -> Future[T]:
        """Raises OverloadedError."""
        with self._lock:
            if self._waiting and self._waiting + size > self._limit:
                raise OverloadedError(
                    self._refusal.format(waiting=self._waiting, size=size, limit=self._limit),
                    headers={SCOPE: "texts"},  # there is room for others
                )
            self._waiting += size
        calls = [call]  # emptied when it is withdrawn, since the pool keeps the rest until its turn

        def begin() -> T:
            self._leave(size)
            return calls.pop()()

        def withdraw(future: Future[T]) -> None:
            if future.cancelled():  # only possible before its turn
                calls.clear()
                self._leave(size)

        future = self._pool.submit(begin)
        future.add_done_callback(withdraw)
        return future

    def _leave(self, size: int) -> None:
        with self._lock:
            self._waiting -= size


_threads = TextThreads()  # of this process
in_text_thread = _threads.run


async def in_template_thread(
    characters: Callable[[], int], function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Like in_text_thread, for a function that may render a chat template.

    A chat that turns out to be slow begins again on the thread for those.
    """
    try:
        return await in_text_thread(characters(), function, *args, **kwargs)
    except SlowTemplateError:
        return await in_text_thread(SLOW, function, *args, **kwargs)
