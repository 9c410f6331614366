"""The engine's tokens/s without HTTP: random prompts, greedy, ignoring eos."""

from __future__ import annotations

import itertools
import queue
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.checkpoints.skeleton import without_weights
from gptj.engine.adapter_slots import Adapter
from gptj.engine.backends import Quantization, best_runner
from gptj.engine.engine import Engine
from gptj.engine.events import Event, Failed, Finished, TokenEvent, one_by_one
from gptj.engine.runners.base import Runner
from gptj.engine.runners.cpu.runner import CpuRunner
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.engine.runners.lora import LoRALimits
from gptj.int4 import is_int4
from gptj.sampling import SamplingParams
from gptj_bench.machine import gpu_read_bandwidth, read_bandwidth

WARM_UP_TOKENS = 4
SPARE_TOKENS = 16
DTYPES = ("bfloat16", "float32", "float16", "int8", "int4", "fp8")
TEXT_IDS = 50000  # ids below this are text in GPT-J's vocabulary


@dataclass(frozen=True)
class Decode:
    model: str  # an address, or the name of a preset
    dtype: str  # one of DTYPES
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    threads: int
    is_preset: bool = False  # with random weights, created on the device

    def run(self) -> Iterator[dict[str, Any]]:
        """One measurement per batch size; the first also has the limit set by memory bandwidth."""
        torch.set_num_threads(self.threads)
        before = self._bandwidth()
        most = max(self.batches)
        cache_tokens = most * (self.prompt_tokens + self.new_tokens + SPARE_TOKENS)
        runner = load_runner(
            self.model, self.dtype, lambda _: cache_tokens, is_preset=self.is_preset
        )
        engine = Engine(
            runner,
            eos_ids=[],
            max_num_seqs=most,
            max_num_batched_tokens=max(512, most),
            prefix_caching=False,
        )
        results = []
        try:
            for batch in self.batches:
                results.append(self._measure(engine, batch, runner.config.vocab_size))
        finally:
            engine.close()
            runner.close()
        bandwidth = max(before, self._bandwidth())
        for result in results:
            if isinstance(runner, CpuRunner | CudaRunner):
                steps = result["decode_tokens_per_s"] / result["batch"]
                share = runner.bytes_read * steps / bandwidth
                result |= {
                    "weights_mb_a_step": round(runner.bytes_read / 1e6, 1),
                    "read_gb_per_s": round(bandwidth / 1e9, 1),
                    "share_of_memory_limit": round(share, 3),
                }
            yield result

    def _bandwidth(self) -> float:
        return gpu_read_bandwidth() if torch.cuda.is_available() else read_bandwidth(self.threads)

    def _measure(self, engine: Engine, batch: int, vocabulary: int) -> dict[str, Any]:
        numbers = random.Random(0)
        below = min(TEXT_IDS, vocabulary)
        prompts = [
            [numbers.randrange(below) for _ in range(self.prompt_tokens)] for _ in range(batch)
        ]
        generate(engine, prompts, WARM_UP_TOKENS)
        timing = generate(engine, prompts, self.new_tokens)
        return {
            "engine": "gptj",
            "dtype": self.dtype,
            "batch": batch,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "threads": self.threads,
            "tokens": timing.tokens,
            "tokens_per_s": round(timing.tokens / timing.seconds, 1),
            "first_token_s": round(timing.first_token_seconds, 3),
            # From the median time between tokens after all prompts are prefilled.
            "decode_tokens_per_s": round(batch / timing.step_seconds, 1),
        }


def load_runner(
    model: str,
    dtype: str,
    cache_tokens: Callable[[GPTJConfig], int],
    *,
    is_preset: bool = False,
    lora: LoRALimits | None = None,
) -> Runner:
    """A model on the GPU, if there is one; int8, int4 and fp8 weights are from bf16.

    Args:
        model: an address, or the name of a preset, which gets random weights.
        cache_tokens: the cache's size.
        lora: limits of adapters; None for no room.
    """
    stored, quantization = split_dtype(dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if is_preset:
        loaded = random_model(GPTJConfig.preset(model), getattr(torch, stored), device)
    else:
        loaded = GPTJForCausalLM.from_pretrained(model, dtype=stored, device=device)
        if is_int4(loaded) and dtype != "int4":
            raise ValueError(f"{model} has 4-bit weights, and cannot be measured in {dtype}")
    tokens = cache_tokens(loaded.config)
    return best_runner(loaded, tokens, quantization=quantization, lora=lora, release=True)


def split_dtype(dtype: str) -> tuple[str, Quantization]:
    """The model's dtype and the weights' quantization, as `args` of the generation service."""
    quantized: dict[str, Quantization] = {"int8": "int8", "int4": "int4", "fp8": "fp8"}
    if dtype in quantized:
        return "bfloat16", quantized[dtype]
    return dtype, "none"


def random_model(config: GPTJConfig, dtype: torch.dtype, device: str) -> GPTJForCausalLM:
    """A model with random weights, created on the device."""
    with without_weights():
        model = GPTJForCausalLM(config)
    model = model.to(dtype).to_empty(device=device).eval()
    torch.manual_seed(0)
    model.initialize()
    return model


@dataclass(frozen=True)
class Timing:
    tokens: int
    seconds: float  # including prefill
    first_token_seconds: float  # until all rows have theirs
    step_seconds: float


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    params: SamplingParams | None = None,
    adapters: Sequence[Adapter | None] | None = None,
) -> Timing:
    """Continue all prompts together, greedily by default, each with its adapter.

    Raises a failed request's error.
    """
    events: queue.SimpleQueue[tuple[float, int, Event]] = queue.SimpleQueue()
    params = params or SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)

    def note(row: int, event: Event) -> None:
        events.put((time.perf_counter(), row, event))

    start = time.perf_counter()
    for row, prompt in enumerate(prompts):
        adapter = adapters[row] if adapters else None
        engine.submit(prompt, params, one_by_one(partial(note, row)), adapter)
    running, tokens = len(prompts), 0
    moments: list[float] = []
    first_tokens: dict[int, float] = {}
    while running:
        moment, row, event = events.get()
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, TokenEvent):
            tokens += 1
            first_tokens.setdefault(row, moment)
            if running == len(prompts):
                moments.append(moment)
        running -= isinstance(event, Finished)
    seconds = time.perf_counter() - start
    # The last row's token of each step; by then steps have all rows.
    steps = moments[len(prompts) - 1 :: len(prompts)][-new_tokens:]
    prefilled = max(first_tokens.values()) - start
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    step = statistics.median(gaps[len(gaps) // 2 :]) if gaps else seconds
    return Timing(tokens, seconds, prefilled, step)
