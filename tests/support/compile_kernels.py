"""Compiles the GPU's kernels as GPT-J 6B calls them, on a machine without a GPU.

    python tests/support/compile_kernels.py [--all]

With --all for every GPU and dtype, and also the candidates that tuning measures; otherwise for the
tightest. Prints a JSON object a program
and GPU: the shared memory of its blocks in bytes, and the registers of a thread and the bytes that
it spills to memory, by NVIDIA's assembler. Ends with an error if a program does not fit its GPU, or
a step launches one that `try_out` has not tried. Run by test_cuda_kernels.py in a process of its
own: Triton compiles or interprets, as it is imported.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, KernelInterface

from gptj import GPTJConfig
from gptj.engine.runners.base import PAGE_SIZE, PageCopy, StepBatch
from gptj.engine.runners.cuda import fp8_linear
from gptj.engine.runners.cuda.fp8 import FP8, quantize, quantized_rows
from gptj.engine.runners.cuda.graphs import SIZES
from gptj.engine.runners.cuda.inputs import InputsMaker
from gptj.engine.runners.cuda.launch import TritonOperations
from gptj.engine.runners.cuda.lora import AdaptedLayer, Ranks
from gptj.engine.runners.cuda.operations import Cache
from gptj.engine.runners.cuda.quantized_linear import (
    ROW_CANDIDATES,
    ROWS_CANDIDATES,
    multiply_rows,
    splits_for,
)
from gptj.engine.runners.cuda.quantized_linear import multiply_row as multiply_quantized_row
from gptj.engine.runners.cuda.quantized_matrix import Bits, QuantizedMatrix
from gptj.engine.runners.cuda.tuned_linear import CANDIDATES, multiply_row
from gptj.engine.runners.cuda.weights import Format, Norm
from gptj.engine.runners.lora import LoRALimits

# GPU, compute capability, shared memory that a block may have, multiprocessors, dtype.
# Turing (7.5) is not among them: its GPUs get PyTorch's kernels.
CASES = (
    ("L4", 89, 101376, 58, torch.float32),  # the largest numbers in the least shared memory
    ("H100", 90, 232448, 132, torch.float16),  # with quantized weights
)
MORE_CASES = (
    ("A100", 80, 166912, 108, torch.bfloat16),
    ("H100", 90, 232448, 132, torch.bfloat16),
    # Of one of these architectures, and with numbers of one of these sizes.
    ("A100", 80, 166912, 108, torch.float16),
    ("A10G", 86, 101376, 80, torch.float16),
    ("L4", 89, 101376, 58, torch.float16),
)
REGISTERS = 65536  # of a multiprocessor, on all of them
SPILLED = 0  # bytes that a thread may write to memory for want of registers
CONFIG = GPTJConfig()
CPU = torch.device("cpu")
LORA = LoRALimits(max_loras=2)


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


def compiled(
    capability: int, shared_memory: int, processors: int, dtype: torch.dtype, *, candidates: bool
) -> list[Any]:
    """All programs: what is tried out, then nothing new by any step, and what tuning measures."""
    programs: dict[str, Any] = {}  # by the hash of their source, its options and the target

    def instead_of_launching(kernel: JITFunction[Any], grid: object) -> Any:
        run = functools.partial(kernel.run, grid=grid, warmup=True)

        def compile_only(*arguments: object, **names: object) -> None:
            program = run(*arguments, **names)
            programs[program.hash] = program

        return compile_only

    KernelInterface.__getitem__ = instead_of_launching  # type: ignore[method-assign]
    triton.runtime.driver.set_active(NoDriver(capability))
    operations = TritonOperations(CONFIG, dtype, processors, shared_memory)
    cache_dtypes = [dtype]
    in_fp8 = dtype != torch.float32 and capability >= 89
    if in_fp8:
        cache_dtypes.append(FP8)
        operations.try_out(CPU, None, "fp8")
    for cache_dtype in cache_dtypes:
        integers: Format | None = None if dtype == torch.float32 else "int4"
        operations.try_out(CPU, LORA, integers, cache_dtype)
    tried = set(programs)
    for cache_dtype in cache_dtypes:
        steps(operations, dtype, cache_dtype)
    new = [program.name for key, program in programs.items() if key not in tried]
    if new:
        raise SystemExit(f"steps launch what was not tried out: {', '.join(new)}")
    if candidates:
        products(dtype)
        if dtype != torch.float32:
            quantized_products(processors, dtype)
        if in_fp8:
            fp8_products(dtype)
    return list(programs.values())


def products(dtype: torch.dtype) -> None:
    """All candidates of one row for the 6B's matrices."""
    width, inner = CONFIG.n_embd, CONFIG.inner_dim
    for blocks in CANDIDATES:
        for inputs, wide in ((width, False), (width + inner, True), (width, True)):
            row, weight = torch.zeros(1, inputs, dtype=dtype), torch.zeros(64, inputs, dtype=dtype)
            multiply_row(row, weight, blocks, wide=wide)


def quantized_products(processors: int, dtype: torch.dtype) -> None:
    """All candidates for the 6B's matrices in 8 and 4 bits, and the head's in 8."""
    width, inner = CONFIG.n_embd, CONFIG.inner_dim
    layers = ((3 * width + inner, width, False), (width, width + inner, True))
    for bits, products in ((8, (*layers, (CONFIG.vocab_size, width, True))), (4, layers)):
        for columns, inputs, wide in products:
            weight = empty_matrix(bits, columns, inputs)
            row = torch.zeros(1, inputs, dtype=dtype)
            for row_blocks in ROW_CANDIDATES[bits]:
                multiply_quantized_row(row, weight, row_blocks, wide=wide)
            for rows, candidates in ROWS_CANDIDATES.items():
                x_TC = torch.zeros(rows, inputs, dtype=dtype)
                for blocks in candidates:
                    splits = splits_for(rows, weight, blocks, processors)
                    multiply_rows(x_TC, weight, blocks, splits, wide=wide)


def fp8_products(dtype: torch.dtype) -> None:
    """All candidates of one row for the 6B's matrices."""
    width, inner = CONFIG.n_embd, CONFIG.inner_dim
    for inputs, wide in ((width, False), (width + inner, True)):
        weight = quantize([torch.zeros(64, inputs)])
        values, _ = quantized_rows(torch.zeros(1, inputs))
        for blocks in fp8_linear.CANDIDATES:
            multiply_row(
                values, weight.values, blocks, wide=wide, dtype=dtype, factor=weight.factor
            )


def empty_matrix(bits: Bits, columns: int, inputs: int) -> QuantizedMatrix:
    blocks = inputs * bits // 512
    words = torch.empty(columns, blocks, 16, dtype=torch.int32)
    scales = torch.empty(columns)
    if bits == 4:
        scales = torch.empty(columns, 2 * blocks, dtype=torch.bfloat16)
    return QuantizedMatrix(bits, words, scales, inputs)


def steps(operations: TritonOperations, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """A layer of the steps that graphs record, of a mixed one, and copies of pages."""
    width, inner, pages = CONFIG.n_embd, CONFIG.inner_dim, 3
    max_pages = CONFIG.n_positions // PAGE_SIZE
    cache = Cache.zeros(CONFIG, 1, pages, cache_dtype, CPU)
    (layer,) = cache.layers()
    vector = torch.zeros(width)
    norm = Norm(vector, vector)
    table = torch.zeros(CONFIG.n_positions, CONFIG.rotated_dim // 2)
    adapted = AdaptedLayer.empty(CONFIG, LORA, dtype, Ranks.empty(LORA, CPU))
    maker = InputsMaker(CPU, max_pages, PAGE_SIZE, pages - 1, SIZES[-1], operations.tile)
    numbers = torch.arange(37, dtype=torch.int32).numpy()
    query_start_loc = torch.tensor([0, 1, 37], dtype=torch.int32).numpy()
    tables = torch.zeros(2, max_pages, dtype=torch.int32).numpy()
    mixed = maker.of(StepBatch(numbers, numbers, query_start_loc, tables, numbers[1:2]))
    for inputs in (*map(maker.static, SIZES), mixed):
        tokens = len(inputs.ids_T)
        x_TD = torch.zeros(tokens, width)
        zeros_TD = torch.zeros(tokens, width, dtype=dtype)
        attn_mlp = torch.zeros(tokens, width + inner, dtype=dtype)
        operations.add_and_norm(x_TD, None, None, norm)
        operations.add_and_norm(x_TD, torch.zeros(tokens, width), vector, norm)
        qkv_fc_in = torch.zeros(tokens, 3 * width + inner, dtype=dtype)
        inner_bias = torch.zeros(inner)
        q_THK = operations.rope_and_cache(
            qkv_fc_in, inner_bias, (table, table), inputs, layer, attn_mlp
        )
        operations.paged_attention(q_THK, inputs, layer, attn_mlp)
        operations.add_lora(qkv_fc_in, zeros_TD, adapted.qkv_fc_in, inputs)
        operations.add_lora(x_TD, attn_mlp, adapted.out_proj_fc_out, inputs)
    operations.copy_pages(cache, [PageCopy(0, 1, 3), PageCopy(0, 2, 3)])


def resources(program: Any, capability: int) -> tuple[int, int]:
    """Registers of a thread, and the bytes that it spills: ptxas says so of the program's PTX."""
    name = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(program.asm["ptx"])
        file.flush()
        command = [
            knobs.nvidia.ptxas.path,
            "-v",
            f"--gpu-name={name}",
            file.name,
            "-o",
            "/dev/null",
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    registers = re.search(r"Used (\d+) registers", result.stderr)
    stores = re.search(r"(\d+) bytes spill stores", result.stderr)
    assert registers is not None and stores is not None, result.stderr
    return int(registers[1]), int(stores[1])


def main() -> None:
    everything = "--all" in sys.argv[1:]
    cases = CASES + (MORE_CASES if everything else ())
    for gpu, capability, limit, processors, dtype in cases:
        for program in compiled(capability, limit, processors, dtype, candidates=everything):
            shared, threads = program.metadata.shared, 32 * program.metadata.num_warps
            registers, spilled = resources(program, capability)
            used = {"shared": shared, "threads": threads, "registers": registers}
            used |= {"spilled": spilled}
            print(json.dumps({"gpu": gpu, "dtype": str(dtype), "kernel": program.name, **used}))
            if shared > limit or registers * threads > REGISTERS or spilled > SPILLED:
                raise SystemExit(f"{program.name} does not fit {gpu} in {dtype}: {used}")


if __name__ == "__main__":
    main()
