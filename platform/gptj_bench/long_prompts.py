"""Streams while long prompts arrive: the time between their tokens, with and without a target.

    python -m gptj_bench.long_prompts --model DIR [--dtype bfloat16] [--streams 4]
                                      [--prompt-tokens 1024] [--prompts 4] [--factors 1.5,2,4]
                                      [--peers DIR]

Runs `streams` streams, and beside them prompts of random ids with one new token, one after the
other, each after a pause. A gap between a stream's events counts as "beside" if a prompt was being
answered during any of it, and as quiet otherwise. First without a target, which also tells the
quiet median; then with `itl_target_seconds` at `factors` times that. With `--peers`, vLLM follows,
in bf16. Prints each time in milliseconds, and the ratio of the gaps beside prompts at p99 to the
quiet median.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from gptj_bench import machine
from gptj_bench.decode import DTYPES, OURS, split_dtype
from gptj_bench.http_load import milliseconds
from gptj_bench.serve import MODEL_NAME, ours, vllm
from gptj_jobs import command_line

QUIET_SECONDS = 10.0  # before the first prompt
PAUSE_SECONDS = 2.0  # after each
STREAM_PROMPT = 16  # tokens
VOCABULARY = 50_000
CONTEXT = 2048
SECONDS = 600  # of a request
Row = dict[str, Any]
Window = tuple[float, float]


@dataclass
class Stream:
    """The times of a stream's events, until it is told to stop."""

    stop: threading.Event
    arrived: list[float] = field(default_factory=list)
    error: str | None = None

    def run(self, url: str, prompt: list[int]) -> None:
        body = _body(prompt, CONTEXT - STREAM_PROMPT - 1) | {"stream": True}
        try:
            with httpx.stream("POST", url, json=body, timeout=SECONDS) as reply:
                reply.raise_for_status()
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        self.arrived.append(time.perf_counter())
                    if self.stop.is_set():
                        return
            self.error = "it ended before the last prompt was answered"
        except httpx.HTTPError as error:  # reported, once all threads have ended
            self.error = repr(error)


def measure(address: str, streams: int, prompt_tokens: int, prompts: int) -> Row:
    """One service's gaps and times to first token.

    Raises:
        RuntimeError: if a stream failed, or ended too early.
        httpx.HTTPError: if a prompt was not answered.
    """
    url = f"{address}/v1/completions"
    numbers = random.Random(prompt_tokens)

    def ids(count: int) -> list[int]:
        return [numbers.randrange(VOCABULARY) for _ in range(count)]

    stop = threading.Event()
    running = [Stream(stop) for _ in range(streams)]
    threads = [
        threading.Thread(target=each.run, args=(url, ids(STREAM_PROMPT))) for each in running
    ]
    for thread in threads:
        thread.start()
    windows: list[Window] = []
    try:
        time.sleep(QUIET_SECONDS)
        for _ in range(prompts):
            begin = time.perf_counter()
            reply = httpx.post(url, json=_body(ids(prompt_tokens), 1), timeout=SECONDS)
            reply.raise_for_status()
            windows.append((begin, time.perf_counter()))
            time.sleep(PAUSE_SECONDS)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors := [each.error for each in running if each.error]:
        raise RuntimeError(f"{len(errors)} of {streams} streams failed: {errors[0]}")
    return {
        "streams": streams,
        "prompt_tokens": prompt_tokens,
        "first_token_ms": milliseconds([end - start for start, end in windows], 0.5),
        **summary([each.arrived for each in running], windows),
    }


def summary(arrived: Sequence[Sequence[float]], windows: Sequence[Window]) -> Row:
    """Gaps between the streams' events, by whether a prompt was being answered in any of it."""
    quiet: list[float] = []
    beside: list[float] = []
    for times in arrived:
        # Not the first: until then the streams' own prompts are prefilled.
        for start, end in pairwise(times[1:]):
            busy = any(start < last and end > first for first, last in windows)
            (beside if busy else quiet).append(end - start)
    found: Row = {
        "quiet_p50_ms": milliseconds(quiet, 0.5),
        "quiet_p99_ms": milliseconds(quiet, 0.99),
        "beside_p50_ms": milliseconds(beside, 0.5),
        "beside_p99_ms": milliseconds(beside, 0.99),
        "beside_max_ms": milliseconds(beside, 1.0),
    }
    ratio = round(found["beside_p99_ms"] / found["quiet_p50_ms"], 2)
    return {**found, "beside_p99 / quiet_p50": ratio}


def _body(prompt: list[int], max_tokens: int) -> Row:
    return {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=command_line.address, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--factors", type=_numbers, default=[1.5, 2.0, 4.0])
    parser.add_argument("--peers", type=command_line.folder)
    given = parser.parse_args()
    print(json.dumps(machine.description()), flush=True)

    def run(service: AbstractContextManager[str], engine: str, target: float | None) -> Row:
        with service as address:
            row = measure(address, given.streams, given.prompt_tokens, given.prompts)
        row = {"engine": engine, "itl_target_seconds": target, **row}
        print(json.dumps(row), flush=True)
        return row

    dtype, quantization = split_dtype(given.dtype)

    @contextmanager
    def with_target(target: float | None) -> Iterator[str]:
        arguments = {"dtype": dtype, "quantization": quantization, "prefix_caching": False}
        if target is not None:
            arguments["itl_target_seconds"] = target
        with (
            tempfile.TemporaryDirectory(prefix="gptj-benchmark-") as folder,
            ours(given.model, arguments, Path(folder)) as address,
        ):
            yield address

    without = run(with_target(None), OURS, None)
    for factor in given.factors:
        target = round(factor * without["quiet_p50_ms"] / 1e3, 4)
        run(with_target(target), OURS, target)
    if given.peers:
        with tempfile.TemporaryDirectory(prefix="gptj-benchmark-") as folder:
            python = given.peers / "vllm" / "bin" / "python"
            service = vllm(given.model, python, Path(folder), max_model_len=CONTEXT)
            run(service, "vllm, bf16", None)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",") if number]


if __name__ == "__main__":
    main()
