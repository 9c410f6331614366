"""Matrix products x W^T in fp8 on tensor cores, by cuBLAS; for a single row also a GEMV kernel.

Activations are quantized by token first (see `fp8`). As in `tuned_linear`, which way is faster is
measured on the actual GPU and matrices.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from gptj.engine.runners.cuda import fp8_kernels as kernels
from gptj.engine.runners.cuda.fp8 import FP8, Fp8Matrix, Product, UnscaledProduct
from gptj.engine.runners.cuda.tuned_linear import LAUNCH_ERRORS, Blocks, multiply_row, seconds_of

logger = logging.getLogger(__name__)

BLOCK_COLUMNS = 2048  # of the kernel that scales a product
WIDE_ROW = 8192  # numbers, from which on a program that quantizes them has more warps


# Of GPT-J-6B's matrices on an H100 the first and the last are the fastest.
CANDIDATES = (Blocks(1, 4096, 4), Blocks(2, 2048, 4), Blocks(4, 1024, 4), Blocks(4, 2048, 8))


class Fp8Linear:
    """Uses only cuBLAS until `tune` is called."""

    def __init__(self) -> None:
        self._chosen: dict[torch.Size, Blocks] = {}  # by the weight's shape
        self._constants: dict[float, Tensor] = {}

    def multiply(self, x_TC: Tensor, weight: Fp8Matrix, *, wide: bool = False) -> UnscaledProduct:
        """See Operations."""
        blocks = self._chosen.get(weight.shape) if len(x_TC) == 1 else None
        return self.multiply_with(blocks, x_TC, weight, wide=wide)

    def multiply_with(
        self, blocks: Blocks | None, x_TC: Tensor, weight: Fp8Matrix, *, wide: bool
    ) -> UnscaledProduct:
        """Args: blocks: of the kernel; None for cuBLAS."""
        values, scales = quantize_rows(x_TC)
        if blocks is not None:
            product = multiply_row(
                values,
                weight.values,
                blocks,
                wide=wide,
                dtype=x_TC.dtype,
                factor=weight.factor,
            )
        else:
            # Fast accumulation keeps fewer bits: on an H100 it errs up to 28 times as much.
            product = torch._scaled_mm(
                values,
                weight.values.t(),
                scale_a=self._constant(weight.factor, x_TC.device),
                scale_b=self._constant(1.0, x_TC.device),
                out_dtype=torch.float32 if wide else x_TC.dtype,
                use_fast_accum=False,
            )
        return UnscaledProduct(product, scales, weight.product_scales)

    def tune(self, weights: Sequence[Fp8Matrix], dtype: torch.dtype, *, wide: bool = False) -> None:
        """Choose the fastest implementation for weights of one shape, on their GPU.

        Args:
            dtype: of the activations.
        """
        first = weights[0]
        self._chosen.pop(first.shape, None)
        x = torch.zeros(1, first.shape[1], dtype=dtype, device=first.values.device)
        times: dict[Blocks | None, float] = {}
        for blocks in (None, *CANDIDATES):

            def multiply(weight: Fp8Matrix, blocks: Blocks | None = blocks) -> Tensor:
                return self.multiply_with(blocks, x, weight, wide=wide).values

            try:
                times[blocks] = seconds_of(multiply, weights, in_graph=True)
            except torch.OutOfMemoryError:
                raise
            except LAUNCH_ERRORS as error:
                if blocks is None:
                    raise
                logger.warning("GEMV in fp8 with %s is not available: %s", blocks, error)
        best = min(times, key=lambda each: times[each])
        if best is not None:
            self._chosen[first.shape] = best
        logger.info(
            "GEMV with weights in fp8 of %s: %s takes %.1f us, cuBLAS %.1f",
            tuple(first.shape),
            "cuBLAS" if best is None else best,
            times[best] * 1e6,
            times[None] * 1e6,
        )

    def _constant(self, number: float, device: torch.device) -> Tensor:
        """On a device, where graphs keep its address."""
        if number not in self._constants:
            self._constants[number] = torch.tensor(number, device=device)
        return self._constants[number]


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


def apply_scales(product: Product) -> Tensor:
    """Multiply a product by its scales, if it has them, in place."""
    if isinstance(product, Tensor):
        return product
    rows, columns = product.values.shape
    kernels.scale_product[(rows, triton.cdiv(columns, BLOCK_COLUMNS))](
        product.values,
        product.row_scales,
        product.column_scales,
        columns,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
    )
    return product.values
