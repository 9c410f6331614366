"""Tokens a second of a 6B in fp16: decode, prefill, time between tokens, four beams."""

from __future__ import annotations

import itertools
import queue
import random
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from checking import Check, run
from models import (
    cache_bytes_a_token,
    new_engine,
    new_model,
    new_runner,
    one_chunk,
    prefill_operations,
    prompts,
)

from gptj.engine.events import Event, Failed, Finished, TokenEvent
from gptj.engine.request import BeamParams, one_by_one
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.sampling import SamplingParams
from gptj_bench.decode import Timing, generate

BATCHES = (1, 64, 8, 32, 128, 256)
MAX_NUM_BATCHED_TOKENS = (1024, 2048, 512)
CHUNKED = (64, 256)  # batches whose prompts take several steps
PROMPT, NEW = 128, 128
PREFILLS = (128, 1024, 2048)
SAMPLED: dict[str, dict[str, Any]] = {"top_p 0.95": {"temperature": 0.8, "top_p": 0.95}}
BEAMS = 4
# MLPerf's GPT-J has 30 to 128 new tokens, and prompts (CNN/DailyMail) of some 870 on the mean.
MLPERF = SamplingParams(max_tokens=128, min_tokens=30)


def main(check: Check) -> None:
    config = check.config()
    batches = check.pick(BATCHES, (1, 3))
    cache = check.pick(160_000, 512)  # positions: 72 GB are left beside 12 GB of weights
    room = cache_room(check, cache)
    runner = new_runner(check, new_model(check, config, torch.float16), room // 16)
    check.add("cache", positions=room, gb=room * cache_bytes_a_token(config, torch.float16) / 1e9)
    max_num_batched_tokens, *others = check.pick(MAX_NUM_BATCHED_TOKENS, (16,))
    for batch in batches:
        _decode(check, runner, batch, max_num_batched_tokens)
    for batch, sampling in itertools.product(check.pick((1, 64), (3,)), SAMPLED):
        if not check.late("decode", 8, batch=batch, sampling=sampling):
            with check.attempt("decode", batch=batch, sampling=sampling):
                decode(check, runner, batch, max_num_batched_tokens, sampling=sampling)
    with check.attempt("prefill"):
        prefill(check, runner)
    if not check.late("beams", 15):
        with check.attempt("beams"):
            beams(check, runner)
    for each in check.pick(sorted(MAX_NUM_BATCHED_TOKENS), [16]):
        if not check.late("pauses", 8, max_num_batched_tokens=each):
            with check.attempt("pauses", max_num_batched_tokens=each):
                pauses(check, runner, each)
    for each in others:
        for batch in CHUNKED:
            _decode(check, runner, batch, each)
    runner.close()


def _decode(check: Check, runner: CudaRunner, batch: int, max_num_batched_tokens: int) -> None:
    values = {"batch": batch, "max_num_batched_tokens": max_num_batched_tokens}
    if not check.late("decode", 12, **values):
        with check.attempt("decode", **values):
            decode(check, runner, batch, max_num_batched_tokens)


def cache_room(check: Check, wanted: int) -> int:
    """Positions that fit beside the weights and what steps need, at most those wanted."""
    config = check.config()
    memory = check.device.memory()
    # 12.1 GB of weights, and 10 GB for graphs, logits and long steps.
    free = memory["free_gb"] * 1e9 - check.pick(22.5e9, 0)
    return min(wanted, int(free / cache_bytes_a_token(config, torch.float16)) // 16 * 16)


def decode(
    check: Check,
    runner: CudaRunner,
    batch: int,
    max_num_batched_tokens: int,
    dtype: str = "fp16",
    sampling: str = "greedy",
) -> None:
    """All together from their prompts on; the median of some runs."""
    prompt, new = check.pick((PROMPT, NEW), (9, 4))
    engine = new_engine(runner, batch, max_num_batched_tokens)
    try:
        asked = prompts(runner.config, [prompt] * batch)
        params = None
        if sampling != "greedy":
            params = SamplingParams(max_tokens=new, ignore_eos=True, **SAMPLED[sampling])
        generate(engine, asked, check.pick(8, 2))  # warms up
        repeats = check.pick(3 if batch <= 64 else 2, 1)
        runs: list[Timing] = [generate(engine, asked, new, params) for _ in range(repeats)]
    finally:
        engine.close()
    middle = sorted(runs, key=lambda each: each.seconds)[len(runs) // 2]
    step = statistics.median(each.step_seconds for each in runs)
    context = prompt + 3 * new // 4  # on the mean of the steps that the median step is one of
    seen = batch * context * cache_bytes_a_token(runner.config, runner.cache_dtype)
    check.add(
        "decode",
        engine="gptj",
        dtype=dtype,
        sampling=sampling,
        batch=batch,
        prompt_tokens=prompt,
        new_tokens=new,
        max_num_batched_tokens=max(max_num_batched_tokens, batch),
        repeats=repeats,
        tokens_per_s=middle.tokens / middle.seconds,
        decode_tokens_per_s=batch / step,
        step_ms=step * 1e3,
        share_of_memory_limit=(runner.bytes_read + seen) / step / check.bandwidth,
        share_by_weights_alone=runner.bytes_read / step / check.bandwidth,
        seconds=[each.seconds for each in runs],
    )


def prefill(check: Check, runner: CudaRunner, dtype: str = "fp16") -> None:
    """One prompt in one step, with logits after its last token."""
    config = runner.config
    for tokens in check.pick(PREFILLS, (8, 33)):
        (ids,) = prompts(config, [tokens])
        batch = one_chunk(ids, range(-(-tokens // runner.page_size)))
        timing = check.time(partial(runner.step, batch), calls=3)
        rate = prefill_operations(config, tokens) / timing["ms"] * 1e3
        check.add(
            "prefill",
            dtype=dtype,
            tokens=tokens,
            tokens_per_s=tokens / timing["ms"] * 1e3,
            tflops=rate / 1e12,
            share_of_matrix_peak=rate / check.matrix_peak,
            **timing,
        )


def beams(check: Check, runner: CudaRunner, dtype: str = "fp16") -> None:
    """MLPerf's offline form with random ids: all samples at once, four beams, 128 new tokens.

    Random weights hardly ever choose eos, so that every search goes on to its end.
    """
    numbers = random.Random(0)
    samples, running = check.pick((128, 256), (2, 8))  # two rounds of 64 searches
    lengths = [numbers.randint(*check.pick((340, 1400), (5, 30))) for _ in range(samples)]
    params, search = MLPERF, BeamParams(num_beams=BEAMS, early_stopping=True)
    if check.rehearsal:
        params = SamplingParams(max_tokens=4, min_tokens=2)
    engine = new_engine(runner, running, check.pick(1024, 16))
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    try:
        generate(engine, prompts(runner.config, [8]), 2)
        start = time.perf_counter()
        for prompt in prompts(runner.config, lengths):
            engine.beam_search(prompt, params, search, one_by_one(events.put))
        left = samples
        while left:
            event = events.get(timeout=120)
            if isinstance(event, Failed):
                raise event.error
            left -= isinstance(event, Finished)
        seconds = time.perf_counter() - start
        stats = engine.stats()
    finally:
        engine.close()
    check.add(
        "beams",
        dtype=dtype,
        samples=samples,
        beams=BEAMS,
        prompt_tokens=statistics.mean(lengths),
        new_tokens=params.max_tokens,
        max_num_batched_tokens=check.pick(1024, 16),
        max_num_seqs=running,
        samples_per_s=samples / seconds,
        steps=stats.steps,
        seconds=seconds,
    )


def pauses(check: Check, runner: CudaRunner, max_num_batched_tokens: int) -> None:
    """Between the tokens of 32 streams, first alone and then while long prompts arrive."""
    streams, new, long, arrivals = check.pick((32, 320, 2032, 6), (2, 8, 40, 1))
    engine = new_engine(runner, streams + 8, max_num_batched_tokens)
    moments: list[list[float]] = [[] for _ in range(streams)]
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def noting(stream: int, event: Event) -> None:
        if isinstance(event, TokenEvent):
            moments[stream].append(time.perf_counter())
        else:
            events.put(event)

    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    ended_long: list[float] = []

    def noting_long(event: Event) -> None:
        if isinstance(event, Finished | Failed):
            ended_long.append(time.perf_counter())

    try:
        for stream, prompt in enumerate(prompts(runner.config, [check.pick(64, 4)] * streams)):
            engine.submit(prompt, params, one_by_one(partial(noting, stream)))
        while min(map(len, moments)) < new // 4:
            if not events.empty() and isinstance(event := events.get(), Failed):
                raise event.error
            time.sleep(0.002)
        arrived = time.perf_counter()
        short = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        for prompt in prompts(runner.config, [long] * arrivals, seed=1):
            engine.submit(prompt, short, one_by_one(noting_long))
            time.sleep(check.pick(0.15, 0))
        ended = 0
        while ended < streams:
            event = events.get(timeout=120)
            if isinstance(event, Failed):
                raise event.error
            ended += isinstance(event, Finished)
    finally:
        engine.close()
    windows = {"alone": (0.0, arrived), "with long prompts": (arrived, max(ended_long, default=0))}
    for when, window in windows.items():
        gaps = _gaps(moments, window)
        check.add(
            "pauses",
            when=when,
            dtype="fp16",
            streams=streams,
            max_num_batched_tokens=max(max_num_batched_tokens, streams + 8),
            long_prompts=0 if when == "alone" else arrivals,
            long_tokens=long,
            p50_ms=_share(gaps, 0.5),
            p95_ms=_share(gaps, 0.95),
            p99_ms=_share(gaps, 0.99),
            most_ms=max(gaps, default=0.0),
            gaps=len(gaps),
        )


def _gaps(moments: Sequence[Sequence[float]], window: tuple[float, float]) -> list[float]:
    """Milliseconds between tokens of a stream, of which the later one is in the window."""
    first, last = window
    return [
        (later - earlier) * 1e3
        for each in moments
        for earlier, later in itertools.pairwise(each)
        if first <= later <= last
    ]


def _share(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


if __name__ == "__main__":
    run(main)
