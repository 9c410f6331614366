"""The engine's tokens/s without HTTP: random prompts, greedy, ignoring eos."""

from __future__ import annotations

import itertools
import os
import queue
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.checkpoints.skeleton import without_weights
from gptj.engine.adapter_slots import Adapter
from gptj.engine.backends import Quantization, best_runner
from gptj.engine.engine import Engine
from gptj.engine.events import Event, Failed, Finished, TokenEvent
from gptj.engine.request import one_by_one
from gptj.engine.runners.base import Runner
from gptj.engine.runners.cpu.runner import CpuRunner
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.engine.runners.lora import LoRALimits
from gptj.layers.int4 import is_int4
from gptj.sampling import SamplingParams
from gptj_bench.machine import gpu_read_bandwidth
from gptj_bench.pace import PaceProbe, Row, undisturbed
from gptj_bench.peer import Peer, PeerError

WARM_UP_TOKENS = 4
SPARE_TOKENS = 16
OURS = "gptj"
DTYPES = ("bfloat16", "float32", "float16", "int8", "int4", "fp8")
TEXT_IDS = 50000  # ids below this are text in GPT-J's vocabulary
# Other engines, each with its environment and a dtype that it supports.
PEERS = (
    ("vllm", "vllm", "bfloat16"),
    ("vllm", "vllm", "float32"),
    ("vllm", "vllm", "int8"),
    ("ctranslate2", "hf", "int8"),
    ("transformers", "hf", "bfloat16"),
    *(("openvino", "ov", dtype) for dtype in ("bfloat16", "int8", "int4")),
    *(("openvino-paged", "ov", dtype) for dtype in ("bfloat16", "int8", "int4")),
)


@dataclass(frozen=True)
class Decode:
    model: str  # an address, or the name of a preset
    dtypes: tuple[str, ...]  # of DTYPES
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    threads: int
    repeats: int
    is_preset: bool = False  # with random weights, created on the device
    peers: Path | None = None  # environments by peers/setup.sh
    least_gb_per_s: float = 0.0

    def run(self) -> Iterator[Row]:
        """Measurements of our engine and of peers, in turn, for each dtype and batch size."""
        torch.set_num_threads(self.threads)
        probe = PaceProbe(self.threads)
        if self.least_gb_per_s and not probe().read_gb_per_s:
            raise ValueError("--least-gb-per-s needs a processor with AVX2 to measure it")
        for dtype in self.dtypes:
            with ExitStack() as stack:
                engines: list[OurEngine | Peer] = [stack.enter_context(closing(self._ours(dtype)))]
                for engine, environment, its_dtype in PEERS if self.peers else ():
                    if its_dtype != dtype:
                        continue
                    python = cast("Path", self.peers) / environment / "bin" / "python"
                    if not python.exists():  # installed in part, on purpose
                        yield {"engine": engine, "dtype": dtype, "not_installed": str(python)}
                        continue
                    try:
                        peer = Peer(python, engine, dtype, self._peer_options())
                    except PeerError as error:
                        yield {"engine": engine, "dtype": dtype, "failed": str(error)}
                        continue
                    engines.append(stack.enter_context(closing(peer)))
                for batch, _, each in itertools.product(self.batches, range(self.repeats), engines):
                    yield self._measured(each, batch, probe)

    def _ours(self, dtype: str) -> OurEngine:
        most = max(self.batches)
        tokens = most * (self.prompt_tokens + self.new_tokens + SPARE_TOKENS)
        runner = load_runner(self.model, dtype, lambda _: tokens, is_preset=self.is_preset)
        return OurEngine(runner, dtype, most, self.prompt_tokens, self.new_tokens)

    def _peer_options(self) -> list[str]:
        return [
            self.model,
            f"--threads={self.threads}",
            f"--prompt-tokens={self.prompt_tokens}",
            f"--new-tokens={self.new_tokens}",
        ]

    def _measured(self, engine: OurEngine | Peer, batch: int, probe: PaceProbe) -> Row:
        measure = partial(engine.measure, batch)
        if torch.cuda.is_available():  # whose work no other program on the processor disturbs
            row, bandwidth = measure(), gpu_read_bandwidth() / 1e9
        else:
            row = undisturbed(measure, probe, engine.processes, self.least_gb_per_s)
            bandwidth = row["read_gb_per_s"]
        if "weights_mb_a_step" in row and bandwidth:
            steps = row["decode_tokens_per_s"] / batch
            share = row["weights_mb_a_step"] * steps / 1e3 / bandwidth
            row["share_of_memory_limit"] = round(share, 3)
        return row


class OurEngine:
    """Our engine, measured in this process."""

    def __init__(
        self, runner: Runner, dtype: str, most: int, prompt_tokens: int, new_tokens: int
    ) -> None:
        self.engine, self.dtype = OURS, dtype
        self.processes = [os.getpid()]
        self._runner = runner
        self._prompt_tokens, self._new_tokens = prompt_tokens, new_tokens
        self._warm: set[int] = set()
        self._engine = Engine(
            runner,
            eos_ids=[],
            max_num_seqs=most,
            max_num_batched_tokens=max(512, most),
            prefix_caching=False,
        )

    def measure(self, batch: int) -> Row:
        numbers = random.Random(batch)
        below = min(TEXT_IDS, self._runner.config.vocab_size)
        prompts = [
            [numbers.randrange(below) for _ in range(self._prompt_tokens)] for _ in range(batch)
        ]
        if batch not in self._warm:
            generate(self._engine, prompts, WARM_UP_TOKENS)
            self._warm.add(batch)
        timing = generate(self._engine, prompts, self._new_tokens)
        row: Row = {
            "engine": self.engine,
            "dtype": self.dtype,
            "batch": batch,
            "tokens": timing.tokens,
            "tokens_per_s": round(timing.tokens / timing.seconds, 1),
            "first_token_s": round(timing.first_token_seconds, 3),
            # From the median time between tokens after all prompts are prefilled.
            "decode_tokens_per_s": round(batch / timing.step_seconds, 1),
        }
        if isinstance(self._runner, CpuRunner | CudaRunner):
            row["weights_mb_a_step"] = round(self._runner.bytes_read / 1e6, 1)
        return row

    def close(self) -> None:
        self._engine.close()
        self._runner.close()


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
