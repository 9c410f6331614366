"""Kernels around products in fp8, launched by `fp8_linear`."""

from __future__ import annotations

import triton
import triton.language as tl

from gptj.engine.runners.cuda.kernels import fp8_scale


@triton.jit
def quantize_rows(
    x,  # (T, inputs)
    values,  # (T, inputs), e4m3
    scales,  # (T), fp32
    inputs,
    BLOCK_INPUTS: tl.constexpr,
):
    """One program per token, which holds all its inputs."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK_INPUTS)
    inside = places < inputs
    row = tl.load(x + token * inputs + places, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = fp8_scale(row)
    row = (row * inverse).to(values.dtype.element_ty)
    tl.store(values + token * inputs + places, row, mask=inside)
    tl.store(scales + token, scale)


@triton.jit
def scale_product(
    product,  # (T, columns), changed in place
    row_scales,  # (T), fp32
    column_scales,  # (columns), fp32
    columns,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program per token and BLOCK_COLUMNS columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < columns
    places = product + token * columns + column
    found = tl.load(places, mask=inside, other=0.0).to(tl.float32) * tl.load(row_scales + token)
    found *= tl.load(column_scales + column, mask=inside, other=0.0)
    tl.store(places, found.to(product.dtype.element_ty), mask=inside)
