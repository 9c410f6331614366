import asyncio
import threading
from contextvars import ContextVar

from gptj.sampling import SamplingParams
from gptj.serving.completions.prompts import ResolvedPrompt
from gptj.serving.completions.schemas import CompletionRequest
from gptj.serving.reply_threads import LONG, MAX_THREADS, in_reply_thread

name: ContextVar[str] = ContextVar("name")


def test_long_replies_leave_the_other_threads_alone() -> None:
    """A function keeps its caller's context, as in asyncio.to_thread."""
    proceed = threading.Event()

    def reply(number: int) -> tuple[int, str]:
        assert proceed.wait(30)
        return number, name.get()

    async def check() -> None:
        name.set("ours")
        replies = [
            asyncio.ensure_future(in_reply_thread(LONG + 1, reply, number)) for number in range(50)
        ]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(asyncio.to_thread(name.get), 30) == "ours"
        assert await asyncio.wait_for(in_reply_thread(LONG, name.get), 30) == "ours"  # a short one
        threads = [each for each in threading.enumerate() if each.name.startswith("long reply")]
        assert len(threads) == MAX_THREADS
        proceed.set()
        assert await asyncio.gather(*replies) == [(number, "ours") for number in range(50)]

    asyncio.run(check())


def test_a_stream_holds_only_its_prompts_logprobs() -> None:
    prompt = ResolvedPrompt("", [1] * 10, b"", [SamplingParams(max_tokens=100)])

    def most(**fields: object) -> int:
        return prompt.most_logprobs(CompletionRequest.model_validate({"prompt": "x", **fields}))

    assert most() == 0
    assert most(logprobs=4, n=3) == 3 * 100 * 5
    assert most(logprobs=4, best_of=7, n=3) == 7 * 100 * 5
    assert most(logprobs=4, n=3, echo=True) == 3 * 110 * 5
    assert most(prompt_logprobs=0, n=3) == 3 * 10
    assert most(logprobs=4, n=3, stream=True) == 0
    assert most(logprobs=4, n=3, stream=True, echo=True) == 3 * 10 * 5
