"""Matrix products x W^T with PyTorch or, for a single row, our GEMV kernel where it is faster.

With one row a product is bound by reading the weights, and libraries differ in how close they get.
So both are measured on the actual GPU and matrices.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from gptj.engine.runners.cuda import kernels
from gptj.engine.runners.fp32_matmul import matmul_fp32

logger = logging.getLogger(__name__)

# Of Triton, its passes, the assembler and C compiler, and a full or read-only cache folder.
LAUNCH_ERRORS = (triton.TritonError, RuntimeError, OSError, subprocess.CalledProcessError)
MEASURED_BYTES = 4 * 2**30  # read per measurement: many times a GPU's cache
MAX_ROUNDS = 20  # for small weights, which matter little


class Stored(Protocol):
    """A tensor, or a quantized matrix."""

    @property
    def nbytes(self) -> int: ...


Weight = TypeVar("Weight", bound=Stored)


@dataclass(frozen=True)
class Blocks:
    """Block sizes of the GEMV kernel."""

    columns: int
    inputs: int
    warps: int


CANDIDATES = (Blocks(1, 2048, 4), Blocks(2, 1024, 4), Blocks(4, 512, 4), Blocks(4, 1024, 8))


class TunedLinear:
    """Uses only PyTorch until `tune` is called."""

    def __init__(self) -> None:
        self._chosen: dict[torch.Size, Blocks] = {}  # by the weight's shape

    def multiply(self, x_TC: Tensor, weight: Tensor, *, wide: bool = False) -> Tensor:
        """See Operations."""
        blocks = self._chosen.get(weight.shape) if len(x_TC) == 1 else None
        if blocks is not None:
            return multiply_row(x_TC, weight, blocks, wide=wide)
        return matmul_fp32(x_TC, weight) if wide else F.linear(x_TC, weight)

    def tune(self, weights: Sequence[Tensor], *, wide: bool = False) -> None:
        """Choose the fastest implementation for weights of one shape and dtype, on their GPU."""
        first = weights[0]
        x = torch.zeros(1, first.shape[1], dtype=first.dtype, device=first.device)
        self._chosen.pop(first.shape, None)
        times: dict[Blocks | None, float] = {
            None: seconds_of(lambda weight: self.multiply(x, weight, wide=wide), weights)
        }
        for blocks in CANDIDATES:

            def multiply(weight: Tensor, blocks: Blocks = blocks) -> Tensor:
                return multiply_row(x, weight, blocks, wide=wide)

            try:
                times[blocks] = seconds_of(multiply, weights)
            except torch.OutOfMemoryError:
                raise
            except LAUNCH_ERRORS as error:
                logger.warning("GEMV with %s is not available: %s", blocks, error)
        best = min(times, key=lambda each: times[each])
        if best is not None:
            self._chosen[first.shape] = best
        logger.info(
            "GEMV with weights of %s: %s reads %.0f GB/s, PyTorch %.0f",
            tuple(first.shape),
            "PyTorch" if best is None else best,
            first.nbytes / times[best] / 1e9,
            first.nbytes / times[None] / 1e9,
        )


def multiply_row(
    x_1C: Tensor,
    weight: Tensor,
    blocks: Blocks,
    *,
    wide: bool,
    dtype: torch.dtype | None = None,
    factor: float = 1.0,
) -> Tensor:
    """The product by the GEMV kernel, times `factor`, a power of 2.

    Args:
        wide: return fp32; otherwise `dtype`, or x's.
    """
    columns, inputs = weight.shape
    dtype = torch.float32 if wide else dtype or x_1C.dtype
    product = torch.empty(1, columns, dtype=dtype, device=x_1C.device)
    kernels.multiply_row[(triton.cdiv(columns, blocks.columns),)](
        x_1C,
        weight,
        product,
        columns,
        INPUTS=inputs,
        BLOCK_COLUMNS=blocks.columns,
        BLOCK_INPUTS=blocks.inputs,
        FACTOR=factor,
        num_warps=blocks.warps,
    )
    return product


def seconds_of(
    multiply: Callable[[Weight], Tensor], weights: Sequence[Weight], *, in_graph: bool = False
) -> float:
    """Mean time of one product.

    Args:
        in_graph: as in a step, for products that can take less time than their launches. On the
            current stream, unless that is the default one, which cannot be captured; cuBLAS keeps
            a workspace for each stream.
    """
    rounds = min(-(-MEASURED_BYTES // sum(weight.nbytes for weight in weights)), MAX_ROUNDS)

    def multiply_all() -> None:
        for weight in weights:
            multiply(weight)

    multiply(weights[0])  # compiles
    again: Callable[[], None] = multiply_all
    if in_graph:
        stream = torch.cuda.current_stream()
        if stream == torch.cuda.default_stream():
            stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            multiply(weights[0])  # allocates a workspace, if there is none
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            multiply_all()
        again = graph.replay
        again()
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(rounds):
        again()
    end.record()
    end.synchronize()
    seconds: float = start.elapsed_time(end) / 1e3
    return seconds / (rounds * len(weights))
