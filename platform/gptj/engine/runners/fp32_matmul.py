"""Matrix products with fp32 accumulation and output, whatever the inputs' dtype.

In bf16 a logit of 20 is rounded to a multiple of 0.125: top tokens tie, and logprobs become coarse.
Sums in fp16 can exceed its maximum, 65504.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 4096  # columns whose weights are converted to fp32 together, on a CPU


def matmul_fp32(x_TC: Tensor, weight: Tensor) -> Tensor:
    """x (T, inputs) by weight (columns, inputs): (T, columns) in fp32, without rounding."""
    if x_TC.dtype == torch.float32 == weight.dtype:
        return F.linear(x_TC, weight)
    if x_TC.device.type == "cuda":
        return torch.mm(x_TC, weight.t(), out_dtype=torch.float32)
    x_TC = x_TC.float()
    return torch.cat([F.linear(x_TC, part.float()) for part in torch.split(weight, BLOCK)], dim=1)


@contextmanager
def fp32_reduction() -> Iterator[None]:
    """Make cuBLAS also reduce split-K sums of fp16 and bf16 in fp32.

    This is a process-wide setting in PyTorch, restored after the block.
    """
    matmul = torch.backends.cuda.matmul
    fp16 = matmul.allow_fp16_reduced_precision_reduction
    bf16 = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = False
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction = fp16
        matmul.allow_bf16_reduced_precision_reduction = bf16
