"""Matrix products x W^T with weights in 8 or 4 bits and activations in fp16 or bf16.

A single row has a GEMV kernel and a few hundred rows a GEMM kernel, which read the packed weights.
For more rows than that, or where it is faster, the weights are dequantized for PyTorch's product.
As in `tuned_linear`, all are measured on the actual GPU and matrices.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from gptj.engine.runners.cuda import quantized_kernels as kernels
from gptj.engine.runners.cuda.quantized_matrix import WORDS, Bits, QuantizedMatrix
from gptj.engine.runners.cuda.tuned_linear import LAUNCH_ERRORS, seconds_of
from gptj.engine.runners.fp32_matmul import matmul_fp32

logger = logging.getLogger(__name__)

ONE = 0x3F800000  # the bits of 1.0
QUAD = 4  # words of 4 bytes that a thread loads together
BLOCK_WORDS, BLOCK_SIZE = 256, 1024  # of the kernel that dequantizes: words, of all columns
BLOCK_SUM = 1024
MAX_SPLITS = 16
MIN_BLOCKS = 4  # of a split


@dataclass(frozen=True)
class RowBlocks:
    """Block sizes of the GEMV kernel."""

    columns: int
    quads: int  # each 16 bytes of a column
    warps: int


@dataclass(frozen=True)
class RowsBlocks:
    """Block sizes of the GEMM kernel."""

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int = 1  # at least, per multiprocessor; the inputs are split for it


Blocks = RowBlocks | RowsBlocks

ROW_CANDIDATES: dict[Bits, tuple[RowBlocks, ...]] = {
    8: (RowBlocks(4, 256, 4), RowBlocks(8, 128, 4), RowBlocks(4, 128, 4), RowBlocks(2, 256, 4)),
    4: (RowBlocks(8, 128, 4), RowBlocks(4, 128, 4), RowBlocks(16, 64, 4), RowBlocks(8, 64, 2)),
}
# By the number of rows up to which they are used, and with which they are measured.
ROWS_CANDIDATES: dict[int, tuple[RowsBlocks, ...]] = {
    16: (
        *(RowsBlocks(16, 64, 4, 4, programs) for programs in (3, 6)),
        *(RowsBlocks(16, 128, 4, 4, programs) for programs in (2, 4)),
    ),
    32: (
        *(RowsBlocks(32, 64, 4, 4, programs) for programs in (3, 6)),
        *(RowsBlocks(32, 128, 4, 3, programs) for programs in (2, 4)),
    ),
    64: (
        *(RowsBlocks(64, 64, 4, 3, programs) for programs in (2, 4)),
        *(RowsBlocks(64, 128, 8, 3, programs) for programs in (1, 2)),
    ),
    128: (RowsBlocks(64, 128, 8, 3, 2), RowsBlocks(128, 128, 8, 3, 1)),
    256: (RowsBlocks(64, 128, 8, 3, 2), RowsBlocks(128, 128, 8, 3, 1)),
}
ROWS = (1, *ROWS_CANDIDATES)


class QuantizedLinear:
    """Only dequantizes until `tune` is called.

    Args:
        processors: the GPU's number of multiprocessors.
    """

    def __init__(self, processors: int) -> None:
        self._processors = processors
        self._chosen: dict[tuple[Bits, torch.Size, int], Blocks] = {}  # by rows of ROWS
        self._scratch = torch.empty(0)

    def multiply(self, x_TC: Tensor, weight: QuantizedMatrix, *, wide: bool = False) -> Tensor:
        """See Operations."""
        if not len(x_TC):  # a step without logits: kernels would read its first row
            dtype = torch.float32 if wide else x_TC.dtype
            return x_TC.new_empty(0, len(weight.words), dtype=dtype)
        blocks = None
        if len(x_TC) <= ROWS[-1]:
            rows = ROWS[bisect_left(ROWS, len(x_TC))]
            blocks = self._chosen.get((weight.bits, weight.shape, rows))
        return self.multiply_with(blocks, x_TC, weight, wide=wide)

    def multiply_with(
        self, blocks: Blocks | None, x_TC: Tensor, weight: QuantizedMatrix, *, wide: bool
    ) -> Tensor:
        """Args: blocks: of a kernel; None to dequantize."""
        if isinstance(blocks, RowBlocks):
            return multiply_row(x_TC, weight, blocks, wide=wide)
        if isinstance(blocks, RowsBlocks):
            splits = splits_for(len(x_TC), weight, blocks, self._processors)
            return multiply_rows(x_TC, weight, blocks, splits, wide=wide)
        dequantized = self._dequantized(weight, x_TC.dtype)
        return matmul_fp32(x_TC, dequantized) if wide else F.linear(x_TC, dequantized)

    def reserve(self, weights: Sequence[QuantizedMatrix], dtype: torch.dtype) -> None:
        """Allocate memory for any of these weights, dequantized: graphs keep its address."""
        size = max(weight.shape.numel() for weight in weights)
        if self._scratch.dtype != dtype or self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=dtype, device=weights[0].words.device)

    def tune(
        self, weights: Sequence[QuantizedMatrix], dtype: torch.dtype, *, wide: bool = False
    ) -> None:
        """Choose the fastest implementation for weights of one shape, on their GPU.

        Args:
            dtype: of the activations.
        """
        self.reserve(weights, dtype)
        for rows in ROWS:
            self._tune(rows, weights, dtype, wide=wide)

    def _tune(
        self, rows: int, weights: Sequence[QuantizedMatrix], dtype: torch.dtype, *, wide: bool
    ) -> None:
        first = weights[0]
        self._chosen.pop((first.bits, first.shape, rows), None)
        x = torch.zeros(rows, first.inputs, dtype=dtype, device=first.words.device)
        times: dict[Blocks | None, float] = {}
        for blocks in (None, *candidates(rows, first.bits)):

            def multiply(weight: QuantizedMatrix, blocks: Blocks | None = blocks) -> Tensor:
                return self.multiply_with(blocks, x, weight, wide=wide)

            try:
                times[blocks] = seconds_of(multiply, weights, in_graph=blocks is not None)
            except torch.OutOfMemoryError:
                raise
            except LAUNCH_ERRORS as error:
                logger.warning("int%d with %s is not available: %s", first.bits, blocks, error)
        best = min(times, key=lambda each: times[each])
        if best is not None:
            self._chosen[first.bits, first.shape, rows] = best
        logger.info(
            "%d rows by int%d weights of %s: %s takes %.1f us, dequantizing %.1f",
            rows,
            first.bits,
            tuple(first.shape),
            "dequantizing" if best is None else best,
            times[best] * 1e6,
            times[None] * 1e6,
        )

    def _dequantized(self, weight: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
        """(columns, inputs), valid until the next call."""
        self.reserve([weight], dtype)
        dequantized = self._scratch[: weight.shape.numel()].view(weight.shape)
        (columns, inputs), words = weight.shape, weight.blocks * WORDS
        block_words = min(BLOCK_WORDS, triton.next_power_of_2(words))
        block_columns = BLOCK_SIZE // block_words
        grid = (triton.cdiv(columns, block_columns), triton.cdiv(words, block_words))
        kernels.dequantize[grid](
            weight.words,
            _scales(weight),
            dequantized,
            columns,
            inputs,
            weight.blocks,
            BITS=weight.bits,
            BLOCK_COLUMNS=block_columns,
            BLOCK_WORDS=block_words,
        )
        return dequantized


def candidates(rows: int, bits: Bits) -> Iterator[Blocks]:
    """Kernels' blocks to measure for a number of rows in ROWS."""
    yield from ROW_CANDIDATES[bits] if rows == 1 else ROWS_CANDIDATES[rows]


def multiply_row(x_1C: Tensor, weight: QuantizedMatrix, blocks: RowBlocks, *, wide: bool) -> Tensor:
    columns, inputs = weight.shape
    dtype = torch.float32 if wide else x_1C.dtype
    product = torch.empty(1, columns, dtype=dtype, device=x_1C.device)
    kernels.multiply_row[(triton.cdiv(columns, blocks.columns),)](
        x_1C,
        weight.words,
        _scales(weight),
        product,
        columns,
        inputs,
        ONE,
        BITS=weight.bits,
        BLOCKS=weight.blocks,
        BLOCK_COLUMNS=blocks.columns,
        BLOCK_QUADS=blocks.quads,
        num_warps=blocks.warps,
    )
    return product


def splits_for(rows: int, weight: QuantizedMatrix, blocks: RowsBlocks, processors: int) -> int:
    """Number of parts of the inputs, a power of 2, to occupy all multiprocessors."""
    programs = triton.cdiv(rows, blocks.rows) * triton.cdiv(len(weight.words), blocks.columns)
    wanted: int = triton.next_power_of_2(triton.cdiv(blocks.programs * processors, programs))
    while wanted > 1 and wanted * MIN_BLOCKS > weight.blocks:
        wanted //= 2
    return min(wanted, MAX_SPLITS)


def multiply_rows(
    x_TC: Tensor, weight: QuantizedMatrix, blocks: RowsBlocks, splits: int, *, wide: bool
) -> Tensor:
    rows, (columns, inputs) = len(x_TC), weight.shape
    dtype = torch.float32 if wide else x_TC.dtype
    product = torch.empty(rows, columns, dtype=dtype, device=x_TC.device)
    parts = product
    if splits > 1:
        parts = torch.empty(splits, rows, columns, dtype=torch.float32, device=x_TC.device)
    grid = (triton.cdiv(rows, blocks.rows), triton.cdiv(columns, blocks.columns), splits)
    kernels.multiply_rows[grid](
        x_TC,
        weight.words,
        _scales(weight),
        parts,
        rows,
        columns,
        inputs,
        weight.blocks,
        triton.cdiv(weight.blocks, splits),
        BITS=weight.bits,
        WHOLE=inputs == weight.blocks * WORDS * (32 // weight.bits),
        BLOCK_ROWS=blocks.rows,
        BLOCK_COLUMNS=blocks.columns,
        STAGES=blocks.stages,
        num_warps=blocks.warps,
    )
    if splits > 1:
        kernels.add_splits[(triton.cdiv(product.numel(), BLOCK_SUM),)](
            parts, product, product.numel(), SPLITS=splits, BLOCK=BLOCK_SUM
        )
    return product


def _scales(weight: QuantizedMatrix) -> Tensor:
    """As the kernels read them: of int4 a block's two together."""
    return weight.scales if weight.bits == 8 else weight.scales.view(torch.int32)
