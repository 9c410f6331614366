"""Weights in 8 or 4 bits, in the layout that the GPU's kernels read.

int8 is symmetric with a scale per column, rounded to nearest; int4 is as in gptj.layers.int4. Both
are the numbers that the CPU's runner computes with (`gptj.engine.runners.cpu.packing`).

A block of a column is 16 words of 32 bits: 64 inputs in int8, 128 in int4. Byte or nibble p of word
w is the block's input 16 p + w, so a thread that loads four words multiplies each of their planes p
by four inputs side by side. int8 stores n + 128 and int4 n + 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gptj.engine.runners.cpu import packing
from gptj.layers import int4
from gptj.layers.int4 import Int4Weight

Bits = Literal[8, 4]

WORDS = 16  # of a block
GROUPS = 2  # of a block in int4, each with a scale
PIECE = 512  # rows packed at a time, to save memory


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix (columns, inputs)."""

    bits: Bits
    words: Tensor  # (columns, blocks, WORDS), int32
    scales: Tensor  # int8: (columns), fp32; int4: (columns, blocks * GROUPS), bf16
    inputs: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.words), self.inputs))

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes

    @property
    def blocks(self) -> int:
        return self.words.shape[1]

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """(columns, inputs), computed in fp32 and rounded once. Slow: the reference."""
        parts = self.words.contiguous().view(torch.uint8)  # (columns, blocks, WORDS * 4)
        if self.bits == 4:
            parts = torch.stack((parts & 15, parts >> 4), dim=-1)
        planes = parts.view(len(self.words), self.blocks, WORDS, 32 // self.bits).mT
        numbers = planes.flatten(1).float() - 2 ** (self.bits - 1)
        if self.bits == 8:
            values = numbers * self.scales[:, None]
        else:
            groups = numbers.unflatten(1, (-1, int4.GROUP_SIZE))
            values = (groups * self.scales.float()[:, :, None]).flatten(1)
        inputs: Tensor = values[:, : self.inputs]
        return inputs.to(dtype)


def packed_bytes(columns: int, inputs: int, bits: Bits) -> int:
    """Of a matrix, packed."""
    blocks = -(-inputs // (WORDS * (32 // bits)))
    scales = 4 * columns if bits == 8 else 2 * columns * blocks * GROUPS
    return 4 * columns * blocks * WORDS + scales


def pack(
    weights: Sequence[Tensor | Int4Weight], bits: Bits, *, beside: bool = False
) -> QuantizedMatrix:
    """Quantize weights (columns, inputs) into one matrix, on their device.

    Args:
        weights: of any float type; for int4 also quantized ones, which keep their values.
        beside: concatenate along the inputs rather than the columns.
    """
    columns = len(weights[0]) if beside else sum(map(len, weights))
    inputs = sum(each.shape[1] for each in weights) if beside else weights[0].shape[1]
    blocks = -(-inputs // (WORDS * (32 // bits)))
    first = weights[0]
    device = first.packed.device if isinstance(first, Int4Weight) else first.device
    words = torch.empty(columns, blocks, WORDS, dtype=torch.int32, device=device)
    if bits == 8:
        scales = torch.empty(columns, device=device)
    else:
        scales = torch.empty(columns, blocks * GROUPS, dtype=torch.bfloat16, device=device)
    start = 0
    for rows in _pieces(weights, beside):
        end = start + len(rows[0])
        words[start:end], scales[start:end] = _int8(rows) if bits == 8 else _int4(rows, blocks)
        start = end
    return QuantizedMatrix(bits, words, scales, inputs)


def _pieces(
    weights: Sequence[Tensor | Int4Weight], beside: bool
) -> Iterator[list[Tensor | Int4Weight]]:
    """A few rows of all weights, if they are beside each other, or of one."""
    for together in [weights] if beside else [[each] for each in weights]:
        for start in range(0, len(together[0]), PIECE):
            yield [each[start : start + PIECE] for each in together]


def _int8(rows: Sequence[Tensor | Int4Weight]) -> tuple[Tensor, Tensor]:
    numbers, scales = packing.quantized(torch.cat([r for r in rows if isinstance(r, Tensor)], 1))
    return _planes(numbers, 8).view(torch.int32).flatten(2), scales


def _int4(rows: Sequence[Tensor | Int4Weight], blocks: int) -> tuple[Tensor, Tensor]:
    parts = [row if isinstance(row, Int4Weight) else int4.quantize(row) for row in rows]
    pairs = torch.cat([part.packed for part in parts], 1).view(torch.uint8)
    numbers = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
    planes = _planes(numbers, 4)
    words = (planes[..., ::2] | planes[..., 1::2] << 4).view(torch.int32).flatten(2)
    scales = torch.cat([part.scales for part in parts], 1)
    return words, F.pad(scales, (0, blocks * GROUPS - scales.shape[1]))


def _planes(numbers: Tensor, bits: Bits) -> Tensor:
    """From (rows, inputs) to (rows, blocks, WORDS, planes), uint8."""
    planes = 32 // bits
    missing = -numbers.shape[1] % (WORDS * planes)
    blocks: Tensor = F.pad(numbers, (0, missing)).unflatten(1, (-1, planes, WORDS))
    return blocks.mT.contiguous()
