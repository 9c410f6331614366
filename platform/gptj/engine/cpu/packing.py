"""A layer's matrices (columns, inputs) as the kernels read them: fp32, bf16 or int8 in blocks.

For each word of inputs (32 bits: one input in fp32, two in bf16, four in int8) a block's 32
columns lie side by side, so that one row of activations needs one pass over the weights, from
their first byte to their last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["fp32", "bf16", "int8"]

KINDS: tuple[Kind, ...] = ("fp32", "bf16", "int8")  # their numbers in kernels.h
BLOCK = 32  # columns
PIECE = 8 * BLOCK  # columns that are packed at a time, in a core's cache
PER_WORD = {"fp32": 1, "bf16": 2, "int8": 4}


@dataclass(frozen=True)
class PackedLinear:
    """y = x W^T + b, with W in blocks."""

    data: Tensor
    scales: Tensor | None  # (columns), int8 only: what a weight's unit stands for
    bias: Tensor  # (columns), fp32
    columns: int
    inputs: int

    @property
    def bytes_read(self) -> int:
        """By one step."""
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
        allocate: gives a tensor of so many bytes.
        beside: they share the columns, and not the inputs.
        spent: is called with rows of the weights that have been packed.
    """
    columns = len(weights[0]) if beside else sum(map(len, weights))
    inputs = sum(each.shape[1] for each in weights) if beside else weights[0].shape[1]
    blocks, width = -(-columns // BLOCK), inputs // PER_WORD[kind]  # in words
    packed = allocate(blocks * BLOCK * width * 4).view(torch.int32).view(blocks, width, BLOCK)
    if columns % BLOCK:
        packed[-1] = 0
    scales = torch.empty(columns) if kind == "int8" else None
    start = 0
    for rows in _pieces(weights, beside):
        piece = rows[0] if len(rows) == 1 else torch.cat(rows, dim=int(beside))
        if scales is not None:
            values, scales[start : start + PIECE] = quantized(piece)
        else:
            values = piece.to(torch.float32 if kind == "fp32" else torch.bfloat16).contiguous()
        # Words of 32 bits, which PyTorch moves faster than their parts.
        words = values.view(torch.int32)
        first, whole = start // BLOCK, len(words) // BLOCK
        packed[first : first + whole] = words[: whole * BLOCK].view(whole, BLOCK, -1).mT
        rest = words[whole * BLOCK :]
        if len(rest):
            packed[first + whole, :, : len(rest)] = rest.T
        for each in rows:
            spent(each)
        start += len(piece)
    if bias is None:
        bias = torch.zeros(columns)
    return PackedLinear(packed, scales, bias.detach().float().clone(), columns, inputs)


def _pieces(weights: Sequence[Tensor], beside: bool) -> Iterator[list[Tensor]]:
    """Rows of the weights that make whole blocks together; the last ones need not."""
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
    """Unsigned bytes (128 stands for 0) and each row's scale: symmetric, rounded to nearest."""
    steps = weight.to(torch.float32, copy=True)
    scales = torch.linalg.vector_norm(steps, torch.inf, dim=1) / 127
    steps.div_(torch.where(scales > 0, scales, 1.0)[:, None]).round_().add_(128)
    return steps.to(torch.uint8), scales
