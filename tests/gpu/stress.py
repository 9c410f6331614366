"""64 threads that take tokens; nearly all memory for the cache; a step that fails."""

from __future__ import annotations

import json
import queue
import threading
import time

import torch
from checking import Check, run
from models import cache_bytes_a_token, cache_tokens, new_engine, new_model, new_runner, prompts
from torch import Tensor

from gptj.engine.engine import Engine
from gptj.engine.events import Event, Failed, Finished, TokenEvent
from gptj.engine.request import one_by_one
from gptj.engine.runners.base import StepBatch
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.sampling import SamplingParams
from gptj_bench.decode import generate

THREADS = 64
SHARE = 0.98


def main(check: Check) -> None:
    config = check.config()
    model = new_model(check, config, torch.float16)
    runner = new_runner(check, model, check.pick(64 * 20, 64))
    with check.attempt("consumers"):
        consumers(check, runner)
    with check.attempt("a step fails"):
        failing_step(check, runner)
    runner.close()
    del runner, model
    check.device.empty()
    if not check.late("nearly all memory", 15):
        with check.attempt("nearly all memory"):
            nearly_all_memory(check)


def consumers(check: Check, runner: CudaRunner) -> None:
    """Threads that do a little with each token, as a server does, beside one that only waits."""
    threads, prompt, new = check.pick((THREADS, 128, 128), (3, 4, 4))
    asked = prompts(runner.config, [prompt] * threads)
    engine = new_engine(runner, threads, check.pick(1024, 16))
    try:
        generate(engine, asked, 4)
        alone = generate(engine, asked, new)
        queues: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in asked]
        counts = [0] * threads

        def consume(number: int) -> None:
            text = ""
            while not isinstance(event := queues[number].get(timeout=120), Finished | Failed):
                assert isinstance(event, TokenEvent)
                text += json.dumps({"choices": [{"text": str(event.token_id), "index": number}]})
                counts[number] += 1

        workers = [threading.Thread(target=consume, args=(n,)) for n in range(threads)]
        for worker in workers:
            worker.start()
        start = time.perf_counter()
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        for each, queue_ in zip(asked, queues, strict=True):
            engine.submit(each, params, one_by_one(queue_.put))
        for worker in workers:
            worker.join(120)
        seconds = time.perf_counter() - start
    finally:
        engine.close()
    check.add(
        "consumers",
        threads=threads,
        new_tokens=new,
        tokens_per_s=sum(counts) / seconds,
        with_one_thread=alone.tokens / alone.seconds,
        right=sum(counts) == threads * new,
    )


def failing_step(check: Check, runner: CudaRunner) -> None:
    """Its requests fail with the reason; the next ones get what they got before."""
    (prompt,) = prompts(runner.config, [check.pick(200, 9)])
    engine = new_engine(runner, 8, check.pick(512, 16))
    step = runner.step

    def failing(batch: StepBatch) -> Tensor:
        logits = step(batch)
        if len(batch.query_start_loc) == 3:  # two sequences
            runner.step = step  # type: ignore[method-assign]
            raise torch.OutOfMemoryError("injected")
        return logits

    try:
        before = _events(engine, [prompt])[0]
        runner.step = failing  # type: ignore[method-assign]
        failed = _events(engine, [prompt, prompt])
        after = _events(engine, [prompt])[0]
        alive = engine.alive(30)
    finally:
        runner.step = step  # type: ignore[method-assign]
        engine.close()
    reasons = [repr(each[-1].error) for each in failed if isinstance(each[-1], Failed)]
    check.add(
        "a step fails",
        failed=len(reasons),
        reason=reasons[:1],
        right=len(reasons) == 2 and before == after and alive,
    )


def _events(engine: Engine, asked: list[list[int]]) -> list[list[Event]]:
    queues: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in asked]
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    for prompt, queue_ in zip(asked, queues, strict=True):
        engine.submit(prompt, params, one_by_one(queue_.put))
    found = []
    for queue_ in queues:
        events: list[Event] = []
        while not events or not isinstance(events[-1], Finished | Failed):
            events.append(queue_.get(timeout=120))
        found.append(events)
    return found


def nearly_all_memory(check: Check) -> None:
    """cache_share=0.98: whatever a step needs beside the cache has to be there all the same."""
    config = check.config()
    model = new_model(check, config, torch.float16)
    streams, length, new = check.pick((128, 900, 24), (2, 20, 3))
    tokens = cache_tokens(check, model, SHARE, 256)
    size = tokens * cache_bytes_a_token(config, torch.float16) / 1e9
    check.add("nearly all memory", when="before", tokens=tokens, gb=size, **check.device.memory())
    runner = new_runner(check, model, tokens // CudaRunner.page_size)
    engine = new_engine(runner, streams, check.pick(2048, 16))
    try:
        timing = generate(engine, prompts(config, [length] * streams), new)
        preemptions = engine.stats().preemptions
    finally:
        engine.close()
        runner.close()
    check.add(
        "nearly all memory",
        when="under load",
        cache_share=SHARE,
        streams=streams,
        prompt_tokens=length,
        tokens_per_s=timing.tokens / timing.seconds,
        preemptions=preemptions,
        right=timing.tokens == streams * new,
        **check.device.memory(),
    )


if __name__ == "__main__":
    run(main)
