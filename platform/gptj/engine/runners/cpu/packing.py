"""Packs matrices (columns, inputs) into blocks for the kernels: fp32, bf16 or int8.

For each 32-bit word of inputs (one in fp32, two in bf16, four in int8) a block's 32 columns are
contiguous, so that a row of activations needs one sequential pass over the weights.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["fp32", "bf16", "int8"]

KINDS: tuple[Kind, ...] = ("fp32", "bf16", "int8")  # their numbers in kernels.h
BLOCK = 32  # columns
PIECE = 8 * BLOCK  # columns packed at a time, to fit in a core's cache
PER_WORD = {"fp32": 1, "bf16": 2, "int8": 4}


@dataclass(frozen=True)
class PackedLinear:
    """y = x W^T + b, with W in blocks."""

    data: Tensor
    scales: Tensor | None  # (columns), int8 only: the value of one unit
    bias: Tensor  # (columns), fp32
    columns: int
    inputs: int

    @property
    def bytes_read(self) -> int:
        """Bytes read by one step."""
        tensors = (self.data, self.scales, self.bias)
        return sum(each.nbytes for each in tensors if each is not None)


def pack(
    weights: Sequence[Tensor],
    bias: Tensor | None,
    kind: Kind,
    allocate: Callable[[int], Tensor],
    *,
    beside: bool = False,
    spent: Callable[[Tensor], None] = lambda rows: None,
) -> PackedLinear:
    """Pack weights (columns, inputs) of any float type into one matrix.

    Args:
        allocate: returns a tensor of that many bytes.
        beside: concatenate along the inputs rather than the columns.
        spent: called with each piece of the weights once it is packed.
    """
    columns = len(weights[0]) if beside else sum(map(len, weights))
    inputs = sum(each.shape[1] for each in weights) if beside else weights[0].shape[1]
    blocks, width = -(-columns // BLOCK), inputs // PER_WORD[kind]  # in words
    packed = allocate(blocks * BLOCK * width * 4).view(torch.int32).view(blocks, width, BLOCK)
    if columns % BLOCK:
        packed[-1] = 0
    scales = torch.empty(columns) if kind == "int8" else None
    held = _scratch(PIECE, inputs, torch.bfloat16 if kind == "bf16" else torch.float32)
    unsigned = _scratch(PIECE if kind == "int8" else 0, inputs, torch.uint8)
    start = 0
    for rows in _pieces(weights, beside):
        values = held[: len(rows[0]) if beside else sum(map(len, rows))]
        end = start + len(values)
        torch.cat(rows, dim=int(beside), out=values)
        if scales is not None:
            scales[start:end] = _quantize(values)
            values = unsigned[: len(values)].copy_(values)
        # PyTorch moves 32-bit words faster than their parts.
        words = values.view(torch.int32)
        first, whole = start // BLOCK, len(words) // BLOCK
        packed[first : first + whole] = words[: whole * BLOCK].view(whole, BLOCK, -1).mT
        rest = words[whole * BLOCK :]
        if len(rest):
            packed[first + whole, :, : len(rest)] = rest.T
        for each in rows:
            spent(each)
        start = end
    if bias is None:
        bias = torch.zeros(columns)
    return PackedLinear(packed, scales, bias.detach().float().clone(), columns, inputs)


def _pieces(weights: Sequence[Tensor], beside: bool) -> Iterator[list[Tensor]]:
    """Rows of the weights that together fill whole blocks, except for the last ones."""
    if beside:
        for start in range(0, len(weights[0]), PIECE):
            yield [weight[start : start + PIECE] for weight in weights]
        return
    rows: list[Tensor] = []
    for weight in weights:
        start = 0
        while start < len(weight):
            rows.append(weight[start : start + PIECE - sum(map(len, rows))])
            start += len(rows[-1])
            if sum(map(len, rows)) == PIECE:
                yield rows
                rows = []
    if rows:
        yield rows


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Unsigned bytes (128 means 0) and each row's scale: symmetric, rounded to nearest."""
    steps = weight.to(torch.float32, copy=True)
    scales = _quantize(steps)
    return steps.to(torch.uint8), scales


def _quantize(weight: Tensor) -> Tensor:
    """Quantize in place, in fp32; returns the scales."""
    scales: Tensor = torch.linalg.vector_norm(weight, torch.inf, dim=1) / 127
    weight.div_(torch.where(scales > 0, scales, 1.0)[:, None]).round_().add_(128)
    return scales


def _scratch(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Scratch memory that, unlike malloc's, is returned to the system afterwards."""
    size = rows * width * dtype.itemsize
    memory = torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)[:size]
    return memory.view(dtype).view(rows, width)
