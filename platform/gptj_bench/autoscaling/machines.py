"""How long a replica's steps and its start take, by machine.

A step reads all weights and all contexts' keys and values once, and computes each new token once;
it takes the longer of the two. `basis` says whether the numbers were measured or computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gptj import GPTJConfig
from gptj.engine import memory

GIGA = 1e9
# GPT-J-6B in fp16: bytes of weights, FLOPs per token (two per parameter), and bytes of keys and
# values per position (2 x 28 layers x 4096 wide x 2 bytes).
WEIGHTS_6B = 12.1e9
FLOP_6B = 2 * 6.05e9
KV_6B = 2 * 28 * 4096 * 2
# Published shares of a GPU's limits, for cards on which we measured nothing: an A100's 111 tokens/s
# at batch 1 are 0.66 of the 2.039 TB/s / 12.1 GB that its memory allows; llm-foundry reaches 0.46
# of the peak in training.
PUBLISHED_MEMORY_SHARE = 0.66
PUBLISHED_COMPUTE_SHARE = 0.46
# Measured on an H100 by `tests/gpu/check.sh` on 2026-11-27. Steps of 1, 8, 32, 64, 128 and 256
# outputs with a mean context of 224 tokens took 4.31, 5.07, 6.00, 7.28, 9.69 and 14.59 ms. With
# this share of 3.35 TB/s they are 8 % longer than measured (one output), up to 3 % shorter (8 to
# 128) and 1 % longer (256). Prompts of 1,024 and 2,048 tokens took 21.09 and 42.02 ms: this share
# of 989 TFLOP/s within 0.2 %. One of 128 tokens took 5.7 ms rather than 4.7.
H100_MEMORY_SHARE = 0.78
H100_COMPUTE_SHARE = 0.595
# From ordering to running a replica, without loading weights, on an existing machine: measured on
# two cores with a model of 0.1 MB (`python -m gptj_bench.autoscaling.measurement`).
START_SECONDS = 5.0
# Extra time on a GPU: context, kernels, first steps. On an H100, compiling and measuring kernels,
# capturing graphs and the first token took 8.6 s; the rest is an assumption.
GPU_START_SECONDS = 10.0
# Loading rate of 12.1 GB of weights: an assumption about network and disk.
LOAD_BYTES_PER_S = 1 * GIGA


@dataclass(frozen=True)
class Machine:
    name: str
    basis: str
    weight_bytes: float
    memory_bytes_per_s: float  # achieved, for weights and cache
    flop_per_token: float
    flop_per_s: float  # achieved
    kv_bytes_per_token: float
    cache_tokens: int
    step_overhead_s: float
    start_s: float  # without weights and provisioning
    load_bytes_per_s: float  # from the store into the replica
    node_s: float  # to provision a machine; 0 if one is idle
    gpus: int = 1
    device: str = "cuda"  # or cpu
    max_num_seqs: int | None = None  # that its overlay sets; None: the default for the cache

    def step_seconds(self, decoding: int, context_tokens: float, prompt_tokens: float) -> float:
        """One step: sequences decoding, their cached tokens, and prompt tokens prefilled."""
        read = self.weight_bytes + self.kv_bytes_per_token * context_tokens
        compute = self.flop_per_token * (decoding + prompt_tokens)
        return self.step_overhead_s + max(read / self.memory_bytes_per_s, compute / self.flop_per_s)

    @property
    def start_seconds(self) -> float:
        """From ordering a replica to its first request."""
        return self.node_s + self.start_s + self.weight_bytes / self.load_bytes_per_s

    def with_node(self, seconds: float) -> Machine:
        """A copy with this provisioning time."""
        if seconds < 0:
            raise ValueError(f"node seconds must be 0 or more, got {seconds}")
        return replace(self, node_s=seconds)


def gpu(name: str, basis: str, memory_gb: int, bytes_per_s: float, flop_per_s: float) -> Machine:
    """GPT-J-6B in fp16 on a GPU with these achieved rates, and the limits of its size's overlay."""
    config = GPTJConfig.preset("6b", dtype=torch.float16)
    fitting = memory.generation(config, memory.CARDS[memory_gb])
    return Machine(
        name=name,
        basis=basis,
        weight_bytes=WEIGHTS_6B,
        memory_bytes_per_s=bytes_per_s,
        flop_per_token=FLOP_6B,
        flop_per_s=flop_per_s,
        kv_bytes_per_token=KV_6B,
        cache_tokens=fitting.cache_tokens,
        max_num_seqs=fitting.max_num_seqs,
        step_overhead_s=0.0,  # included in the shares
        start_s=START_SECONDS + GPU_START_SECONDS,
        load_bytes_per_s=LOAD_BYTES_PER_S,
        node_s=0.0,
    )


# 305 M parameters in bf16 on two cores of a Xeon with AMX (`python -m gptj_bench model` makes one).
# Steps of 1, 8, 16, 32 and 64 outputs took 33, 45, 59, 87 and 163 ms, and a prompt of 256 tokens
# 488 ms: 33.5 ms, and 1.9 ms for each token, within 10 %.
CPU = Machine(
    name="cpu-305m",
    basis="measured on two cores",
    weight_bytes=0.61 * GIGA,
    memory_bytes_per_s=1e15,  # unlimited: included in the overhead
    flop_per_token=0.61 * GIGA,
    flop_per_s=0.61 * GIGA / 1.9e-3,
    kv_bytes_per_token=2 * 16 * 1024 * 2,
    cache_tokens=64 * 2048,
    step_overhead_s=33.5e-3,
    start_s=START_SECONDS,
    load_bytes_per_s=LOAD_BYTES_PER_S,
    node_s=0.0,
    device="cpu",
)
H100 = gpu(
    "h100",
    "steps measured on an H100",
    80,
    H100_MEMORY_SHARE * 3.35e12,
    H100_COMPUTE_SHARE * 989e12,
)
A10G = gpu(
    "a10g",
    "arithmetic, not measured",
    24,
    PUBLISHED_MEMORY_SHARE * 0.6e12,
    PUBLISHED_COMPUTE_SHARE * 125e12,
)
MACHINES = {machine.name: machine for machine in (H100, A10G, CPU)}
