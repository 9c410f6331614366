"""Compiles the GPU's kernels as GPT-J 6B calls them, on a machine without a GPU.

    python tests/compile_kernels.py

Prints a JSON object a kernel and GPU, with the shared memory of its programs in bytes. Run by
test_cuda_kernels.py in a process of its own: Triton compiles or interprets, as it is imported.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, KernelInterface

from gptj import GPTJConfig
from gptj.engine.cuda.inputs import InputsMaker
from gptj.engine.cuda.launch import TritonOperations
from gptj.engine.cuda.operations import Inputs, LayerCache
from gptj.engine.cuda.products import CANDIDATES, multiply_row
from gptj.engine.cuda.weights import Norm

# GPU, compute capability, shared memory that a program may have, dtype.
CASES = (
    ("H100", 90, 232448, torch.float16),
    ("A100", 80, 166912, torch.bfloat16),
    ("L4", 89, 101376, torch.float32),
)
CONFIG = GPTJConfig()


class NoDriver:
    """What Triton asks of a driver to compile for a GPU."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # what is compiled for one device is not taken for another's

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(capability: int, dtype: torch.dtype) -> list[Any]:
    """What one step of single tokens and one with a chunk launch, compiled."""
    kernels: list[Any] = []

    def instead_of_launching(kernel: JITFunction[Any], grid: object) -> Any:
        run = functools.partial(kernel.run, grid=grid, warmup=True)
        return lambda *args, **names: kernels.append(run(*args, **names))

    KernelInterface.__getitem__ = instead_of_launching  # type: ignore[method-assign]
    triton.runtime.driver.set_active(NoDriver(capability))
    operations = TritonOperations(CONFIG, dtype, 132)
    width, inner = CONFIG.n_embd, CONFIG.inner_dim
    x_TD, wide = torch.zeros(1, width), torch.zeros(inner)
    joined = torch.zeros(1, width + inner, dtype=dtype)
    norm = Norm(x_TD[0], x_TD[0])
    pages = torch.zeros(1, CONFIG.n_head, 16, CONFIG.head_dim, dtype=dtype)
    cache = LayerCache(pages, pages)
    table = torch.zeros(1, CONFIG.rotated_dim // 2)
    operations.add_and_norm(x_TD, None, None, norm)
    operations.add_and_norm(x_TD, joined, x_TD[0], norm)
    for singles in (1, 256):
        inputs = InputsMaker(torch.device("cpu"), 128, 16, 0, singles).static(singles)
        entered = torch.zeros(1, 3 * width + inner, dtype=dtype)
        q_THK = operations.spread(entered, wide, (table, table), inputs, cache, joined)
        operations.attend(q_THK, inputs, cache, joined)
    tile = torch.zeros(1, 4, dtype=torch.int32)
    entry = torch.zeros(3 * width + inner, width, dtype=dtype)
    for blocks in CANDIDATES:
        multiply_row(x_TD.to(dtype), entry, blocks)
    chunk = Inputs(tile, tile, tile, inputs.tables_RP, 0, tiles_N4=tile)
    operations.attend(q_THK, chunk, cache, joined)
    return kernels


def main() -> None:
    for gpu, capability, limit, dtype in CASES:
        for kernel in compiled(capability, dtype):
            shared = kernel.metadata.shared
            print(json.dumps({"gpu": gpu, "dtype": str(dtype), kernel.name: shared}), flush=True)
            if shared > limit:
                raise SystemExit(f"{kernel.name} needs {shared} bytes, of which {gpu} has {limit}")


if __name__ == "__main__":
    main()
