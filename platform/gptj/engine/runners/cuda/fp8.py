"""Weights in fp8 for matrix products whose activations are fp8 too.

Both are e4m3 (Micikevicius et al., "FP8 formats for deep learning", 2022), rounded to nearest after
a division by a scale, with which the product is multiplied: static ones of the weights' columns
(per channel), and dynamic ones of the tokens, which do not depend on the other tokens of a step.
Scales are powers of 2, so that a division is an exact multiplication by the inverse, and loses none
of a float's precision.

Tensor cores multiply the numbers without these scales. Whatever reads a product applies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of FP8
LEAST = 2.0**-100  # lower bound of a row's largest magnitude, so that a row of zeros has a scale
PIECE = 512  # columns quantized at a time, to save memory
ALIGNMENT = 16  # of both widths of a matrix, for tensor cores


@dataclass(frozen=True)
class Fp8Matrix:
    """A matrix (columns, inputs)."""

    values: Tensor  # (columns, inputs), FP8
    product_scales: Tensor  # (columns), fp32: of products of the numbers with `factor`

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.product_scales.nbytes

    @property
    def factor(self) -> float:
        """A power of 2 with which no sum of products of numbers exceeds fp16's largest number."""
        return factor_for(self.values.shape[1])

    @property
    def scales(self) -> Tensor:
        """Of the weights: (columns), fp32."""
        return self.product_scales * self.factor

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """(columns, inputs), computed in fp32 and rounded once."""
        return (self.values.float() * self.scales[:, None]).to(dtype)


def factor_for(inputs: int) -> float:
    """See Fp8Matrix.factor."""
    return 2.0 ** -(inputs.bit_length() + 2)


@dataclass(frozen=True)
class UnscaledProduct:
    """A product before its scales: values[t, c] * row_scales[t] * column_scales[c]."""

    values: Tensor  # (T, columns)
    row_scales: Tensor  # (T), fp32
    column_scales: Tensor  # (columns), fp32


Product = Tensor | UnscaledProduct


def parts_of(product: Product) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A product's numbers, and the scales of its rows and columns, if it has them."""
    if isinstance(product, UnscaledProduct):
        return product.values, product.row_scales, product.column_scales
    return product, None, None


def fp8_bytes(columns: int, inputs: int) -> int:
    """Of an Fp8Matrix."""
    return columns * inputs + 4 * columns


def quantize(weights: Sequence[Tensor], *, beside: bool = False) -> Fp8Matrix:
    """Quantize weights (columns, inputs) into one matrix, on their device.

    Args:
        beside: concatenate along the inputs rather than the columns.
    """
    columns = len(weights[0]) if beside else sum(map(len, weights))
    inputs = sum(each.shape[1] for each in weights) if beside else weights[0].shape[1]
    device = weights[0].device
    values = torch.empty(columns, inputs, dtype=FP8, device=device)
    scales = torch.empty(columns, device=device)
    start = 0
    for together in [weights] if beside else [[each] for each in weights]:
        for first in range(0, len(together[0]), PIECE):
            rows = torch.cat([each[first : first + PIECE].float() for each in together], dim=1)
            end = start + len(rows)
            values[start:end], scales[start:end] = quantized_rows(rows)
            start = end
    return Fp8Matrix(values, scales / factor_for(inputs))


def quantized_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers in FP8 and the scale of each row, of rows (..., N) in fp32."""
    scales = scales_for(rows.abs().amax(dim=-1))
    return (rows / scales[..., None]).to(FP8), scales


def scales_for(largest: Tensor) -> Tensor:
    """The least powers of 2 by which these numbers, in fp32, are at most LARGEST.

    NaN for infinity, which conversions may take for e4m3's largest number.
    """
    significands, exponents = torch.frexp(largest.clamp_min(LEAST))  # of 448: 0.875 and 9
    exponents += (significands > LARGEST / 512).int() - 9
    scales = torch.ldexp(torch.ones_like(largest), exponents)
    return torch.where(largest.isfinite(), scales, torch.nan)
