"""Short texts do not wait for long ones, long ones are bounded, and the event loop stays free."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace

import pytest

import gptj.serving
from gptj import GPTJTokenizer
from gptj.chat import ChatTemplate
from gptj.chat.template import QUICK_SECONDS
from gptj.serving.chat import messages as messages_module
from gptj.serving.chat.messages import ChatMessage, TemplateFields, rendering_size
from gptj.serving.errors import SCOPE, InvalidRequestError, OverloadedError
from gptj.serving.reply_threads import in_reply_thread
from gptj.serving.text_threads import (
    LONG,
    LONG_THREADS,
    MAX_WAITING,
    SLOW,
    TextThreads,
    in_quick_thread,
    in_template_thread,
)

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


def test_no_text_waits_for_slow_templates_and_few_of_them_wait() -> None:
    threads, proceed = TextThreads(max_slow_waiting=2), threading.Event()
    begun = threading.Event()

    def render() -> bool:
        begun.set()
        return proceed.wait(30) and not in_quick_thread()

    async def check() -> None:
        slow = [asyncio.ensure_future(threads.run(SLOW, render))]
        assert await asyncio.to_thread(begun.wait, 30)
        slow += [asyncio.ensure_future(threads.run(SLOW, render)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="2 chats with slow templates wait") as refused:
            await threads.run(SLOW, render)
        assert refused.value.headers == {"Retry-After": "1", SCOPE: "texts"}
        for size in (1, LONG, LONG + 1, MAX_WAITING):
            assert await asyncio.wait_for(threads.run(size, in_quick_thread), 30)
        assert not any(each.done() for each in slow)
        proceed.set()
        assert await asyncio.gather(*slow) == [True] * 3

    asyncio.run(check())


class Chats(TemplateFields):
    """Chats with a template that is slow while `endless`, and the threads that rendered them."""

    def chat(self, template: ChatTemplate, text: str, endless: bool) -> str:
        messages = [ChatMessage(role="user", content=text)]
        self.chat_template_kwargs = {"n": 99999 if endless else 1}

        def rendered() -> str:
            used.append(threading.current_thread().name.rsplit("_", 1)[0])
            return self.rendered(template, messages)

        async def run() -> str:
            return await in_template_thread(lambda: rendering_size(template, messages), rendered)

        used: list[str] = []
        if endless:
            with pytest.raises(InvalidRequestError, match="does too much: it takes more than"):
                asyncio.run(run())
        else:
            asyncio.run(run())
        return ", ".join(used)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "kind"), [("hi", "short text"), ("hi" * LONG, "long text")], ids=["short", "long"]
)
def test_a_template_is_slow_after_two_slow_chats_and_quick_after_a_quick_one(
    text: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages_module, "QUICK_SECONDS", 0.1)
    monkeypatch.setattr(messages_module, "MAX_SECONDS", 0.3)
    template = ChatTemplate(
        "{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}"
    )
    chats = Chats()
    assert chats.chat(template, text, endless=True) == f"{kind}, slow template"
    assert chats.chat(template, text, endless=False) == kind  # a single one was chance
    assert chats.chat(template, text, endless=True) == f"{kind}, slow template"
    assert chats.chat(template, text, endless=True) == f"{kind}, slow template"
    assert chats.chat(template, text, endless=True) == "slow template"
    assert chats.chat(template, text, endless=False) == "slow template"
    assert chats.chat(template, text, endless=False) == kind


def test_a_slow_probe_of_a_template_is_not_taken_for_its_answer() -> None:
    """It takes 0.3 s to see a user's text, in both forms: more than the quick threads give it."""
    chats, messages = Chats(), [ChatMessage(role="user", content="Where do penguins live?")]
    template = ChatTemplate(
        "{% for m in messages %}{% if m.content is not string %}{{ slow() }}{{ m.content[0].text }}"
        "{% endif %}{% endfor %}",
    )

    async def run() -> str:
        return await in_template_thread(
            lambda: rendering_size(template, messages), chats.rendered, template, messages
        )

    waits = iter([0.3, 0.0, 0.0, 0.0])

    def slow() -> str:
        end = time.thread_time() + next(waits)
        while time.thread_time() < end:
            pass
        return ""

    template._template.globals["slow"] = slow
    assert asyncio.run(run()) == "Where do penguins live?"
    assert asyncio.run(run()) == "Where do penguins live?"


def test_a_chat_that_a_quick_thread_rendered_is_slow_if_it_took_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the template did in one step, before its limit was checked."""
    messages = [ChatMessage(role="user", content="hi")]
    template = ChatTemplate("{{ messages[0].content }}")
    assert not template.wants_parts()
    times = iter([0.0, QUICK_SECONDS * 2, 0.0, QUICK_SECONDS * 2, 0.0, QUICK_SECONDS / 2])
    monkeypatch.setattr(messages_module, "time", SimpleNamespace(thread_time=lambda: next(times)))
    monkeypatch.setattr(messages_module, "in_quick_thread", lambda: True)
    slow = []
    for _ in range(3):
        assert TemplateFields().rendered(template, messages) == "hi"
        slow.append(template.is_slow)
    assert slow == [False, True, False]


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
