"""Where the time of a step goes: kernels, idle GPU, and the host's Python.

From PyTorch's profiler, which records a replayed graph's kernels one by one. Its traces are kept
beside the results (chrome://tracing opens them).
"""

from __future__ import annotations

import cProfile
import gzip
import json
import pstats
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from checking import Check, run
from models import new_engine, new_model, new_runner, one_chunk, prompts
from torch.profiler import ProfilerActivity, profile

from gptj.engine.events import Event, Finished, TokenEvent
from gptj.engine.request import BeamParams, one_by_one
from gptj.engine.runners.base import StepBatch
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.sampling import SamplingParams
from gptj_bench.decode import generate

BATCHES = (1, 64)
BEAMS = 4
STEPS = 12  # that are profiled
FIRST = 4  # tokens of a sequence that are not
LINES = 15  # of a table
TRACE_BYTES = 4 * 2**20  # compressed; larger ones are left out


def main(check: Check) -> None:
    model = new_model(check, check.config(), torch.float16)
    runner = new_runner(check, model, check.pick(BEAMS * 64 * 12, 64))
    prompt = check.pick(1024, 20)
    (ids,) = prompts(runner.config, [prompt])
    batch = one_chunk(ids, range(-(-prompt // runner.page_size)))
    for batch_size in check.pick(BATCHES, (1, 3)):
        with check.attempt("decode step", batch=batch_size):
            decoding(check, runner, batch_size)
    with check.attempt("beam step"):
        searching(check, runner)
    with check.attempt("prefill step"):
        runner.step(batch)
        trace = traced(check, lambda: [runner.step(batch) for _ in range(3)], "prefill")
        check.add("prefill step", tokens=prompt, **summary(check, trace, 3))
    for batch_size in check.pick(BATCHES, (3,)):
        with check.attempt("host time", batch=batch_size):
            host(check, runner, batch_size)
    runner.close()


class Gate:
    """Where the engine's thread waits until it may go on."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        self.reached.set()
        self.opened.wait(60)


def decoding(check: Check, runner: CudaRunner, batch: int, dtype: str = "fp16") -> None:
    """Some steps of the engine, sampling included, while all sequences decode.

    Those whose prompts were computed first have more tokens, so that the last one's count, and all
    go on until the profile has ended.
    """
    engine = new_engine(runner, batch, check.pick(512, 16))
    steps = check.pick(STEPS, 2)
    gates = {FIRST: Gate(), FIRST + steps: Gate()}
    begin, end = gates.values()
    ended = threading.Semaphore(0)
    tokens = 0

    def note(stream: int, event: Event) -> None:  # in the engine's thread, which a gate holds
        nonlocal tokens
        if isinstance(event, TokenEvent) and stream == batch - 1:
            tokens += 1
            if tokens in gates:
                gates[tokens].pass_through()
        if isinstance(event, Finished):
            ended.release()

    # A step computes one prompt or more.
    params = SamplingParams(max_tokens=FIRST + steps + 4 + batch, temperature=0, ignore_eos=True)

    def go_on() -> None:
        begin.opened.set()
        end.reached.wait(60)

    try:
        generate(engine, prompts(runner.config, [check.pick(128, 9)] * batch), 4)
        for stream, prompt in enumerate(prompts(runner.config, [check.pick(128, 9)] * batch)):
            engine.submit(prompt, params, one_by_one(partial(note, stream)))
        begin.reached.wait(60)
        trace = traced(check, go_on, re.sub(r"\W+", "-", f"decode-{dtype}-{batch}"))
        end.opened.set()
        for _ in range(batch):
            ended.acquire(timeout=60)
    finally:
        for gate in gates.values():
            gate.opened.set()
        engine.close()
    check.add("decode step", dtype=dtype, batch=batch, steps=steps, **summary(check, trace, steps))


def searching(check: Check, runner: CudaRunner) -> None:
    """Some steps of beam search, which are not launched ahead, with all prompts computed."""
    samples, prompt = check.pick((64, 128), (2, 9))
    first, steps = check.pick((12, STEPS), (4, 2))
    gates = {first: Gate(), first + steps: Gate()}
    begin, end = gates.values()
    plain, calls = runner.step, 0

    def step(batch: StepBatch) -> torch.Tensor:  # in the engine's thread, which a gate holds
        nonlocal calls
        calls += 1
        if calls in gates:
            gates[calls].pass_through()
        return plain(batch)

    def go_on() -> None:
        begin.opened.set()
        end.reached.wait(60)

    params = SamplingParams(max_tokens=first + steps + 4, min_tokens=first + steps + 4)
    ended = threading.Semaphore(0)

    def note(event: Event) -> None:
        if isinstance(event, Finished):
            ended.release()

    engine = new_engine(runner, BEAMS * samples, check.pick(2048, 32))
    try:
        with mock.patch.object(runner, "step", step):
            for each in prompts(runner.config, [prompt] * samples):
                engine.beam_search(each, params, BeamParams(num_beams=BEAMS), one_by_one(note))
            begin.reached.wait(60)
            trace = traced(check, go_on, "beams")
            end.opened.set()
            for _ in range(samples):
                ended.acquire(timeout=60)
    finally:
        for gate in gates.values():
            gate.opened.set()
        engine.close()
    check.add(
        "beam step", samples=samples, beams=BEAMS, steps=steps, **summary(check, trace, steps)
    )


def traced(check: Check, function: Callable[[], object], name: str) -> list[dict[str, Any]]:
    """The events of the device while a function runs; (its operations on a CPU)."""
    activity = ProfilerActivity.CPU if check.rehearsal else ProfilerActivity.CUDA
    with profile(activities=[activity]) as profiler:
        function()
        check.device.synchronize()
    path = Path(check.out) / f"trace-{name}.json"
    profiler.export_chrome_trace(str(path))
    content = path.read_bytes()
    path.unlink()
    compressed = gzip.compress(content, 6)
    if len(compressed) < TRACE_BYTES and not check.rehearsal:
        path.with_suffix(".json.gz").write_bytes(compressed)
    kinds = ("cpu_op",) if check.rehearsal else ("kernel", "gpu_memcpy", "gpu_memset")
    events = json.loads(content)["traceEvents"]
    return [each for each in events if each.get("ph") == "X" and each.get("cat") in kinds]


def summary(check: Check, events: Sequence[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Milliseconds of a step, by kernel, and how long the device had nothing to do."""
    if not events:  # of a CPU's operations, those of other threads are not recorded
        reason = "the profiler has recorded nothing"
        return {"skipped": reason} if check.rehearsal else {"error": reason}
    spans = sorted((each["ts"], each["ts"] + each["dur"]) for each in events)
    begin, end = spans[0][0], max(last for _, last in spans)
    busy, reached, gaps = 0.0, begin, []
    for first, last in spans:
        if first > reached:
            gaps.append(first - reached)
        busy += max(0.0, last - max(first, reached))
        reached = max(reached, last)
    by_kernel: dict[str, list[float]] = defaultdict(list)
    for each in events:
        by_kernel[each["name"][:90]].append(each["dur"])
    slowest = sorted(by_kernel.items(), key=lambda item: -sum(item[1]))[:LINES]
    return {
        "ms": (end - begin) / steps / 1e3,
        "busy_ms": busy / steps / 1e3,
        "idle_ms": (end - begin - busy) / steps / 1e3,
        "idle_share": 1 - busy / (end - begin),
        "longest_gaps_us": sorted(gaps, reverse=True)[:5],
        "launches": len(events) / steps,
        "kernels": [
            {
                "name": name,
                "ms": sum(times) / steps / 1e3,
                "share": sum(times) / busy,
                "calls": len(times) / steps,
                "us_each": sum(times) / len(times),
            }
            for name, times in slowest
        ],
    }


def host(check: Check, runner: CudaRunner, batch: int) -> None:
    """Functions of the engine's thread, by their own time; the profiler itself takes some."""
    engine = new_engine(runner, batch, check.pick(512, 16))
    steps = check.pick(64, 4)
    profiler = cProfile.Profile()
    ended = threading.Semaphore(0)
    tokens = 0

    def note(stream: int, event: Event) -> None:  # in the engine's thread, which is profiled
        nonlocal tokens
        if isinstance(event, TokenEvent) and stream == batch - 1:
            tokens += 1
            if tokens == FIRST:
                profiler.enable()
            if tokens == FIRST + steps:
                profiler.disable()
        if isinstance(event, Finished):
            ended.release()

    params = SamplingParams(max_tokens=FIRST + steps + 4 + batch, temperature=0, ignore_eos=True)
    try:
        for stream, prompt in enumerate(prompts(runner.config, [check.pick(64, 9)] * batch)):
            engine.submit(prompt, params, one_by_one(partial(note, stream)))
        for _ in range(batch):
            ended.acquire(timeout=60)
    finally:
        engine.close()
    found = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    slowest = sorted(found.items(), key=lambda item: -item[1][2])[:LINES]
    check.add(
        "host time",
        batch=batch,
        steps=steps,
        ms=sum(own for _, _, own, _, _ in found.values()) / steps * 1e3,
        functions=[
            {
                "name": f"{Path(file).name}:{line} {name}"[:90],
                "own_ms": own / steps * 1e3,
                "with_called_ms": whole / steps * 1e3,
                "calls": calls / steps,
            }
            for (file, line, name), (_, calls, own, whole, _) in slowest
        ],
    )


if __name__ == "__main__":
    run(main)
