"""A layer's matrices (columns, inputs) as the kernels read them: fp32, bf16 or int8 in blocks.

For each word of inputs (32 bits: one input in fp32, two in bf16, four in int8) a block's 32
columns lie side by side, so that one row of activations needs one pass over the weights, from
their first byte to their last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["fp32", "bf16", "int8"]

KINDS: tuple[Kind, ...] = ("fp32", "bf16", "int8")  # their numbers in kernels.h
BLOCK = 32  # columns
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
    weight: Tensor, bias: Tensor | None, kind: Kind, allocate: Callable[[int], Tensor]
) -> PackedLinear:
    """Pack a weight (columns, inputs) of any float type.

    Args:
        allocate: gives a tensor of so many bytes.
    """
    columns, inputs = weight.shape
    scales = None
    if kind == "int8":
        words, scales = quantized(weight)
    else:
        words = weight.to(torch.float32 if kind == "fp32" else torch.bfloat16)
    per_word = PER_WORD[kind]
    blocks = -(-columns // BLOCK)
    whole = columns // BLOCK
    size = blocks * BLOCK * inputs * words.element_size()
    packed = allocate(size).view(words.dtype).view(blocks, inputs // per_word, BLOCK, per_word)
    split = words[: whole * BLOCK].view(whole, BLOCK, inputs // per_word, per_word)
    packed[:whole].copy_(split.transpose(1, 2))
    if whole < blocks:
        packed[whole] = 0
        rest = words[whole * BLOCK :].view(-1, inputs // per_word, per_word)
        packed[whole, :, : len(rest)] = rest.transpose(0, 1)
    if bias is None:
        bias = torch.zeros(columns)
    return PackedLinear(packed, scales, bias.detach().float().clone(), columns, inputs)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Unsigned bytes (128 stands for 0) and each row's scale: symmetric, rounded to nearest."""
    scales = weight.float().abs().amax(dim=1) / 127
    steps = weight.float() / torch.where(scales > 0, scales, 1.0)[:, None]
    return (steps.round() + 128).to(torch.uint8), scales
