"""Matrix products x W^T in fp8 on tensor cores, and for a single row a GEMV kernel.

Activations are quantized by token first (see `fp8`). cuBLAS knows two kinds of scales: of whole
matrices, whose products our kernel multiplies by the scales of rows and columns, and those scales
themselves. Which is faster depends on the shape, and is measured on the actual GPU and matrices.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor

from gptj.engine.runners.cuda import fp8_kernels as kernels
from gptj.engine.runners.cuda.fp8 import FP8, Fp8Matrix
from gptj.engine.runners.cuda.tuned_linear import LAUNCH_ERRORS, seconds_of

logger = logging.getLogger(__name__)

BLOCK_COLUMNS = 2048  # of the kernel that scales a product
WIDE_ROW = 8192  # numbers, from which on a program that quantizes them has more warps


@dataclass(frozen=True)
class Blocks:
    """Block sizes of the GEMV kernel."""

    columns: int
    inputs: int
    warps: int


Scaling = Literal["by matrix", "by row"]
Way = Blocks | Scaling

SCALINGS: tuple[Scaling, ...] = ("by matrix", "by row")
CANDIDATES = (Blocks(1, 4096, 4), Blocks(2, 2048, 4), Blocks(4, 1024, 4), Blocks(4, 2048, 8))
ROWS = (1, 16, 64, 256, 1024, 4096)  # with which products are measured, each for up to so many


class Fp8Linear:
    """Scales by matrix until `tune` is called."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[torch.Size, int], Way] = {}  # by rows of ROWS
        self._factors: dict[float, Tensor] = {}

    def multiply(self, x_TC: Tensor, weight: Fp8Matrix, *, wide: bool = False) -> Tensor:
        """See Operations."""
        rows = ROWS[min(bisect_left(ROWS, len(x_TC)), len(ROWS) - 1)]
        way = self._chosen.get((weight.shape, rows), "by matrix")
        return self.multiply_with(way, x_TC, weight, wide=wide)

    def multiply_with(self, way: Way, x_TC: Tensor, weight: Fp8Matrix, *, wide: bool) -> Tensor:
        dtype = torch.float32 if wide else x_TC.dtype
        if not len(x_TC):  # a step without logits
            return x_TC.new_empty(0, len(weight.values), dtype=dtype)
        values, scales = quantize_rows(x_TC)
        if isinstance(way, Blocks):
            return multiply_row(values, scales, weight, way, dtype)
        if way == "by row":
            return torch._scaled_mm(
                values,
                weight.values.t(),
                scale_a=scales[:, None],
                scale_b=weight.scales[None],
                out_dtype=dtype,
            )
        # No sum of products exceeds fp16 with this factor.
        factor = 2.0 ** -(weight.shape[1].bit_length() + 2)
        product = torch._scaled_mm(
            values,
            weight.values.t(),
            scale_a=self._on(x_TC.device, factor),
            scale_b=self._on(x_TC.device, 1.0),
            out_dtype=dtype,
        )
        columns = product.shape[1]
        kernels.scale_product[(len(product), triton.cdiv(columns, BLOCK_COLUMNS))](
            product, scales, weight.scales, columns, 1 / factor, BLOCK_COLUMNS=BLOCK_COLUMNS
        )
        return product

    def tune(self, weights: Sequence[Fp8Matrix], dtype: torch.dtype, *, wide: bool = False) -> None:
        """Choose the fastest implementation for weights of one shape, on their GPU.

        Args:
            dtype: of the activations.
        """
        for rows in ROWS:
            self._tune(rows, weights, dtype, wide=wide)

    def _tune(
        self, rows: int, weights: Sequence[Fp8Matrix], dtype: torch.dtype, *, wide: bool
    ) -> None:
        first = weights[0]
        x = torch.zeros(rows, first.shape[1], dtype=dtype, device=first.values.device)
        times: dict[Way, float] = {}
        for way in (*SCALINGS, *(CANDIDATES if rows == 1 else ())):

            def multiply(weight: Fp8Matrix, way: Way = way) -> Tensor:
                return self.multiply_with(way, x, weight, wide=wide)

            try:
                times[way] = seconds_of(multiply, weights, in_graph=isinstance(way, Blocks))
            except torch.OutOfMemoryError:
                raise
            except LAUNCH_ERRORS as error:
                if way == "by matrix":
                    raise
                logger.info("fp8 with %s is not available: %s", way, error)
        best = min(times, key=lambda each: times[each])
        self._chosen[first.shape, rows] = best
        logger.info(
            "%d rows by fp8 weights of %s: %s takes %.1f us, by matrix %.1f",
            rows,
            tuple(first.shape),
            best,
            times[best] * 1e6,
            times["by matrix"] * 1e6,
        )

    def _on(self, device: torch.device, factor: float) -> Tensor:
        """A constant on a device, where graphs keep its address."""
        if factor not in self._factors:
            self._factors[factor] = torch.tensor(factor, device=device)
        return self._factors[factor]


def quantize_rows(x_TC: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers in FP8 (T, C) and scales (T) in fp32."""
    rows, inputs = x_TC.shape
    values = torch.empty(rows, inputs, dtype=FP8, device=x_TC.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x_TC.device)
    kernels.quantize_rows[(rows,)](
        x_TC,
        values,
        scales,
        inputs,
        BLOCK_INPUTS=triton.next_power_of_2(inputs),
        num_warps=16 if inputs > WIDE_ROW else 8,
    )
    return values, scales


def multiply_row(
    values_1C: Tensor, scale: Tensor, weight: Fp8Matrix, blocks: Blocks, dtype: torch.dtype
) -> Tensor:
    columns, inputs = weight.shape
    product = torch.empty(1, columns, dtype=dtype, device=values_1C.device)
    kernels.multiply_row[(triton.cdiv(columns, blocks.columns),)](
        values_1C,
        scale,
        weight.values,
        weight.scales,
        product,
        columns,
        INPUTS=inputs,
        BLOCK_COLUMNS=blocks.columns,
        BLOCK_INPUTS=blocks.inputs,
        num_warps=blocks.warps,
    )
    return product
