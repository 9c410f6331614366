"""Packs matrices (columns, inputs) into blocks for the kernels: fp32, bf16, int8 or int4.

For each 32-bit word of inputs (one in fp32, two in bf16, four in int8, eight in int4) a block's 32
columns are contiguous, so that a row of activations needs one sequential pass over the weights.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gptj.config import GPTJConfig
from gptj.engine.runners.cpu.library import UnsupportedError
from gptj.layers import int4
from gptj.layers.int4 import Int4Weight

Kind = Literal["fp32", "bf16", "int8", "int4"]

KINDS: tuple[Kind, ...] = ("fp32", "bf16", "int8", "int4")  # their numbers in kernels.h
BLOCK = 32  # columns
PIECE = 8 * BLOCK  # columns packed at a time, to fit in a core's cache
PER_WORD = {"fp32": 1, "bf16": 2, "int8": 4, "int4": 8}


@dataclass(frozen=True)
class PackedLinear:
    """y = x W^T + b, with W in blocks."""

    kind: Kind
    data: Tensor
    scales: Tensor | None  # int8: (columns), int4: (blocks, groups, BLOCK); the value of one unit
    bias: Tensor  # (columns), fp32
    columns: int
    inputs: int

    @property
    def bytes_read(self) -> int:
        """Bytes read by one step."""
        tensors = (self.data, self.scales, self.bias)
        return sum(each.nbytes for each in tensors if each is not None)


def pack(
    weights: Sequence[Tensor] | Sequence[Int4Weight],
    bias: Tensor | None,
    kind: Kind,
    allocate: Callable[[int], Tensor],
    *,
    beside: bool = False,
    spent: Callable[[Tensor], None] = lambda rows: None,
) -> PackedLinear:
    """Pack weights (columns, inputs) into one matrix.

    Args:
        weights: of any float type; for int4 also quantized ones, whose words stay as they are.
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
    scales = None
    if kind == "int8":
        scales = torch.empty(columns)
    elif kind == "int4":
        scales = torch.zeros(blocks, inputs // int4.GROUP_SIZE, BLOCK, dtype=torch.bfloat16)
    to_words = _ToWords(kind, inputs)
    start = 0
    for rows in _pieces(weights, beside):
        words, units = to_words(rows, beside)
        end = start + len(words)
        _fill_blocks(packed, words, start)
        if units is not None and scales is not None:
            if kind == "int8":
                scales[start:end] = units
            else:
                _fill_blocks(scales, units, start)
        for each in rows:
            spent(each.packed if isinstance(each, Int4Weight) else each)
        start = end
    if bias is None:
        bias = torch.zeros(columns)
    return PackedLinear(kind, packed, scales, bias.detach().float().clone(), columns, inputs)


def _fill_blocks(blocks: Tensor, rows: Tensor, start: int) -> None:
    """Write rows (N, width) into blocks (B, width, BLOCK) as columns from `start` on."""
    first, whole = start // BLOCK, len(rows) // BLOCK
    blocks[first : first + whole] = rows[: whole * BLOCK].view(whole, BLOCK, -1).mT
    rest = rows[whole * BLOCK :]
    if len(rest):
        blocks[first + whole, :, : len(rest)] = rest.T


class _ToWords:
    """Converts a piece of the weights to 32-bit words, and the values of their units."""

    def __init__(self, kind: Kind, inputs: int) -> None:
        self._kind = kind
        self._held = _scratch(PIECE, inputs, torch.bfloat16 if kind == "bf16" else torch.float32)
        self._unsigned = _scratch(PIECE if kind == "int8" else 0, inputs, torch.uint8)

    def __call__(
        self, rows: list[Tensor] | list[Int4Weight], beside: bool
    ) -> tuple[Tensor, Tensor | None]:
        dim = int(beside)
        if self._kind == "int4":
            parts = [row if isinstance(row, Int4Weight) else int4.quantize(row) for row in rows]
            words = torch.cat([part.packed for part in parts], dim)
            return words, torch.cat([part.scales for part in parts], dim)
        floats = [row for row in rows if isinstance(row, Tensor)]
        values = self._held[: len(rows[0]) if beside else sum(map(len, rows))]
        torch.cat(floats, dim, out=values)
        units = None
        if self._kind == "int8":
            units = _quantize(values)
            values = self._unsigned[: len(values)].copy_(values)
        # PyTorch moves 32-bit words faster than their parts.
        return values.view(torch.int32), units


def _pieces(weights: Sequence[Any], beside: bool) -> Iterator[list[Any]]:
    """Rows of the weights that together fill whole blocks, except for the last ones."""
    if beside:
        for start in range(0, len(weights[0]), PIECE):
            yield [weight[start : start + PIECE] for weight in weights]
        return
    rows: list[Any] = []
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


def check_int4_widths(config: GPTJConfig) -> None:
    """UnsupportedError unless each layer's inputs are whole groups."""
    if config.n_embd % int4.GROUP_SIZE or config.inner_dim % int4.GROUP_SIZE:
        raise UnsupportedError(
            f"int4 needs n_embd={config.n_embd} and n_inner={config.inner_dim} to be multiples of "
            f"{int4.GROUP_SIZE}"
        )


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
