"""How long a replica's steps and its start take, by machine.

A step reads all weights and all contexts' keys and values once, and computes each new token once;
it takes the longer of the two. `basis` says whether the numbers were measured or computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GIGA = 1e9
# GPT-J-6B in fp16: bytes of weights, FLOPs per token (two per parameter), and bytes of keys and
# values per position (2 x 28 layers x 4096 wide x 2 bytes).
WEIGHTS_6B = 12.1e9
FLOP_6B = 2 * 6.05e9
KV_6B = 2 * 28 * 4096 * 2
# Published shares of a GPU's limits: an A100's 111 tokens/s at batch 1 are 0.66 of the
# 2.039 TB/s / 12.1 GB that its memory allows; llm-foundry reaches 0.46 of the peak in training.
MEMORY_SHARE = 0.66
COMPUTE_SHARE = 0.46
# From ordering to running a replica, without loading weights, on an existing machine: measured on
# two cores with a model of 0.1 MB (`python -m gptj_bench.autoscaling.measurement`).
START_SECONDS = 5.0
# Extra time on a GPU: context, kernels, first steps. An assumption.
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


def gpu(name: str, memory_gb: float, bandwidth_gb: float, tflops: float) -> Machine:
    """GPT-J-6B in fp16 on a GPU, computed from its data sheet."""
    return Machine(
        name=name,
        basis="arithmetic, not measured",
        weight_bytes=WEIGHTS_6B,
        memory_bytes_per_s=MEMORY_SHARE * bandwidth_gb * GIGA,
        flop_per_token=FLOP_6B,
        flop_per_s=COMPUTE_SHARE * tflops * 1e12,
        kv_bytes_per_token=KV_6B,
        # The deployment's default is 0.95 of what weights and the largest steps leave free.
        cache_tokens=int(0.9 * (memory_gb * GIGA - WEIGHTS_6B) / KV_6B),
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
MACHINES = {
    machine.name: machine
    for machine in (gpu("h100", 80, 3350, 989), gpu("a10g", 24, 600, 125), CPU)
}
