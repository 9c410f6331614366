"""Short texts do not wait for long ones, long ones are bounded, and the event loop stays free."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from contextvars import ContextVar
from pathlib import Path

import pytest

import gptj.serving
from gptj import GPTJTokenizer
from gptj.serving.errors import SCOPE, OverloadedError
from gptj.serving.reply_threads import in_reply_thread
from gptj.serving.text_threads import LONG, LONG_THREADS, TextThreads

name: ContextVar[str] = ContextVar("name")


def test_short_texts_and_replies_do_not_wait_for_long_texts() -> None:
    threads, proceed = TextThreads(), threading.Event()

    async def check() -> None:
        name.set("ours")
        long = [asyncio.ensure_future(threads.run(LONG + 1, proceed.wait, 30)) for _ in range(20)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(threads.run(LONG, name.get), 30) == "ours"
        assert await asyncio.wait_for(in_reply_thread(1, name.get), 30) == "ours"
        assert not any(each.done() for each in long)
        proceed.set()
        assert await asyncio.gather(*long) == [True] * 20

    asyncio.run(check())


def test_too_many_long_texts_are_refused_and_those_who_leave_make_room() -> None:
    size = 2 * LONG
    threads, proceed = TextThreads(max_waiting=3 * size), threading.Event()
    begun = threading.Semaphore(0)
    answered: list[int] = []

    def work(number: int) -> int:
        begun.release()
        assert proceed.wait(30)
        answered.append(number)
        return number

    def send(number: int) -> asyncio.Task[int]:
        return asyncio.ensure_future(threads.run(size, work, number))

    async def check() -> None:
        running = [send(number) for number in range(LONG_THREADS)]
        for _ in running:
            assert await asyncio.to_thread(begun.acquire, timeout=30)
        waiting = [send(number) for number in range(LONG_THREADS, LONG_THREADS + 3)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match=f"limit of {3 * size}") as refused:
            await send(100)
        assert refused.value.headers == {"Retry-After": "1", SCOPE: "texts"}
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        waiting.append(send(101))  # has its place
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await send(102)
        proceed.set()
        await asyncio.gather(*running, *waiting[1:])

    asyncio.run(check())
    assert sorted(answered) == [*range(LONG_THREADS), LONG_THREADS + 1, LONG_THREADS + 2, 101]


def test_a_text_above_the_bound_may_wait_alone() -> None:
    threads = TextThreads(max_waiting=1)
    assert asyncio.run(threads.run(100 * LONG, lambda: "answer")) == "answer"


def test_the_tokenizer_leaves_the_interpreter_to_other_threads() -> None:
    """While it encodes, another thread runs: the library must release the interpreter's lock."""
    tokenizer = GPTJTokenizer.train(["a river runs past it"], 300)
    text = "a river runs past it " * 20_000
    tokenizer.encode("warm up")
    switch = sys.getswitchinterval()
    sys.setswitchinterval(100)  # nobody is interrupted: only who releases the lock lets others run
    try:
        ran: list[float] = []
        begun, done = threading.Event(), threading.Event()

        def watch() -> None:
            begun.set()
            while not done.is_set():
                ran.append(time.monotonic())
                time.sleep(0.001)

        thread = threading.Thread(target=watch)
        thread.start()
        assert begun.wait(30)
        start = time.monotonic()
        encodings = tokenizer._encode_all([text])
        end = time.monotonic()
        done.set()
        thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert len(encodings[0].ids) > 20_000
    assert any(start < moment < end for moment in ran)


def test_services_leave_asyncios_own_threads_alone() -> None:
    """They are shared and unbounded: whatever runs there delays everything else there."""
    folder = Path(gptj.serving.__file__).parent
    for path in folder.rglob("*.py"):
        assert "to_thread(" not in path.read_text(), path
        assert "run_in_executor(None" not in path.read_text(), path
