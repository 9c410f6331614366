"""Threads that tokenize requests' texts and render their chat templates.

Long texts, and templates that take long, have threads of their own, so that short ones do not wait
for them, and a bound on how many may wait. The tokenizer's library holds no lock of Python's while
it encodes.
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
MAX_WAITING = 2**23  # characters of long texts that wait for a thread: 8 s of a core

P = ParamSpec("P")
T = TypeVar("T")


_of_thread = threading.local()


def _mark_short() -> None:
    _of_thread.is_short = True


def in_short_thread() -> bool:
    """Whether this is a thread for short texts, whose work must end soon."""
    return getattr(_of_thread, "is_short", False)


class TextThreads:
    """Two lanes of threads: for short texts, and for long ones.

    Args:
        max_waiting: most characters of long texts that wait; a text above it may wait alone.
    """

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self._max_waiting = max_waiting
        self._waiting = 0  # characters
        self._lock = threading.Lock()
        self._short = ThreadPoolExecutor(SHORT_THREADS, "short text", _mark_short)
        self._long = ThreadPoolExecutor(LONG_THREADS, "long text")

    async def run(
        self, characters: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Like asyncio.to_thread, for a function of a text with so many characters or ids.

        Cancelling the call gives up its place among those that wait. Raises OverloadedError if too
        many long texts do.
        """
        call = partial(copy_context().run, function, *args, **kwargs)
        if characters <= LONG:
            return await asyncio.wrap_future(self._short.submit(call))
        return await asyncio.wrap_future(self._submit_long(characters, call))

    def _submit_long(self, characters: int, call: Callable[[], T]) -> Future[T]:
        with self._lock:
            if self._waiting and self._waiting + characters > self._max_waiting:
                raise OverloadedError(
                    f"long texts of {self._waiting} characters wait to be tokenized, and "
                    f"{characters} more would exceed the limit of {self._max_waiting}: try again "
                    f"later",
                    headers={SCOPE: "texts"},  # there is room for shorter ones
                )
            self._waiting += characters
        calls = [call]  # emptied when it is withdrawn, since the pool keeps the rest until its turn

        def begin() -> T:
            self._leave(characters)
            return calls.pop()()

        def withdraw(future: Future[T]) -> None:
            if future.cancelled():  # only possible before its turn
                calls.clear()
                self._leave(characters)

        future = self._long.submit(begin)
        future.add_done_callback(withdraw)
        return future

    def _leave(self, characters: int) -> None:
        with self._lock:
            self._waiting -= characters


_threads = TextThreads()  # of this process
in_text_thread = _threads.run


async def in_template_thread(
    characters: Callable[[], int], function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Like in_text_thread, for a function that may render a chat template.

    One that turns out to be slow begins again on a thread for long texts, and the next chats begin
    there: `characters` is then above LONG.
    """
    try:
        return await in_text_thread(characters(), function, *args, **kwargs)
    except SlowTemplateError:
        return await in_text_thread(characters(), function, *args, **kwargs)
