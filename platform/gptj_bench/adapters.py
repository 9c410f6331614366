"""The cost of adapters: tokens/s of a batch of requests with different adapters.

The same batch is decoded alternately by a runner without room for adapters, by one with unused
adapters, and with the adapters, since a machine's speed varies. The ratios are of wall-clock time
and, for a machine under other load, of CPU time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gptj import GPTJConfig
from gptj.engine.adapter_slots import Adapter, AdapterSlots
from gptj.engine.adapter_weights import shape_of
from gptj.engine.engine import Engine
from gptj.engine.runners.base import Runner
from gptj.engine.runners.lora import LoRALimits, LoRAPair, LoRAWeights
from gptj_bench.decode import generate

Row = dict[str, Any]

PROMPT = 16  # tokens


def random_weights(config: GPTJConfig, rank: int, modules: Sequence[str], seed: int) -> LoRAWeights:
    generator = torch.Generator().manual_seed(seed)

    def pair(module: str) -> LoRAPair:
        outputs, inputs = shape_of(config, module)
        a_RI = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        return LoRAPair(a_RI, 0.01 * torch.randn(outputs, rank, generator=generator))

    layers = tuple({module: pair(module) for module in modules} for _ in range(config.n_layer))
    return LoRAWeights(rank, layers, seed.to_bytes(8, "little"))


def measure(
    make_runner: Callable[[LoRALimits | None], Runner],
    batch: int,
    adapters: int,
    rank: int,
    modules: Sequence[str],
    tokens: int,
    repeats: int,
) -> Iterator[Row]:
    """Tokens/s of the base model, of a runner with unused room for adapters, and of adapters.

    Args:
        make_runner: makes a runner with room for adapters, or without.
        adapters: assigned to rows round-robin.
        modules: that the adapters change.
    """
    prompts = [[(row * 7 + place) % 1000 for place in range(PROMPT)] for row in range(batch)]
    limits = LoRALimits(adapters, rank)
    runners = {"base": make_runner(None), "room": make_runner(limits)}
    engines = {
        name: Engine(runner, eos_ids=[], max_num_seqs=batch, prefix_caching=False)
        for name, runner in runners.items()
    }
    slots = AdapterSlots(runners["room"], limits)
    config = runners["room"].config
    loaded = [slots.load(random_weights(config, rank, modules, seed)) for seed in range(adapters)]
    kinds: dict[str, tuple[Engine, list[Adapter | None]]] = {
        "base": (engines["base"], [None] * batch),
        "unused": (engines["room"], [None] * batch),
        "adapters": (engines["room"], [loaded[row % adapters] for row in range(batch)]),
    }
    wall: dict[str, list[float]] = {kind: [] for kind in kinds}
    cpu: dict[str, list[float]] = {kind: [] for kind in kinds}
    try:
        for repeat in range(repeats + 1):
            for kind, (engine, rows) in kinds.items():
                start = time.process_time()
                timing = generate(engine, prompts, tokens, adapters=rows)
                if repeat:  # the first is a warm-up
                    wall[kind].append(timing.step_seconds)
                    cpu[kind].append(time.process_time() - start)
    finally:
        for engine in engines.values():
            engine.close()
        for runner in runners.values():
            runner.close()
    yield {
        "batch": batch,
        "adapters": adapters,
        "rank": rank,
        "modules": ",".join(modules),
        **{
            f"tokens_per_s_{kind}": round(batch / statistics.median(each), 1)
            for kind, each in wall.items()
        },
        **{
            f"{name}_of_base_{what}": round(_ratio(times["base"], times[name]), 3)
            for what, times in (("tokens_per_s", wall), ("per_cpu_second", cpu))
            for name in ("unused", "adapters")
        },
    }


def _ratio(base: Sequence[float], others: Sequence[float]) -> float:
    """The median ratio of adjacent runs' speeds."""
    return statistics.median(one / other for one, other in zip(base, others, strict=True))
