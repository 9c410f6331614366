"""Matrix products whose sums are kept in fp32, whatever the dtype of what is multiplied.

A logit of 20 that is rounded to bf16 is a multiple of 0.125: the likeliest tokens become equal, and
log-probabilities coarse. Sums of fp16 can exceed its largest number, 65504.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 4096  # columns whose weights are converted together, where they have to be


def multiply_wide(x_TC: Tensor, weight: Tensor) -> Tensor:
    """x (T, inputs) by weight (columns, inputs): (T, columns) of fp32, not rounded before."""
    if x_TC.dtype == torch.float32 == weight.dtype:
        return F.linear(x_TC, weight)
    if x_TC.device.type == "cuda":
        return torch.mm(x_TC, weight.t(), out_dtype=torch.float32)
    x_TC = x_TC.float()
    return torch.cat([F.linear(x_TC, part.float()) for part in torch.split(weight, BLOCK)], dim=1)


@contextmanager
def wide_sums() -> Iterator[None]:
    """cuBLAS may cut long sums of fp16 or bf16 in parts: here it adds them up in fp32 as well.

    PyTorch has this as a setting of the process, which is as before after the block.
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
