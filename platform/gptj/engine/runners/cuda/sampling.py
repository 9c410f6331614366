"""Draws tokens on a GPU, in one kernel: temperature, top_k, top_p, min_p and the draw.

PyTorch sorts each row's candidates, and takes a dozen kernels; here a row's threshold is found by
bisection over its probabilities, without sorting, as in FlashInfer (Ye et al., "FlashInfer:
Efficient and Customizable Attention Engine for LLM Inference Serving", 2025).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from gptj.engine.runners.cuda import sampling_kernels

BLOCK = 8192  # of a row, in registers
DRAW_BLOCK = 2048
WARPS = 16


def draw(
    logits_RV: Tensor,
    rows_D: Tensor,
    temperatures_D: Tensor,
    top_k_D: Tensor,
    top_p_D: Tensor,
    min_p_D: Tensor,
    uniforms_D: Tensor,
) -> Tensor:
    """A token (D) for each of some rows: the first whose cumulative probability exceeds a number.

    Restricted as `gptj.sampling` does, in Hugging Face's order: tokens that tie with the last one
    kept are kept, too.

    Args:
        logits_RV: fp32, with contiguous rows; -inf for tokens that must not be drawn.
        rows_D: int64.
        temperatures_D: (D) or (D, 1), contiguous, like all that follow; fp32, above 0.
        top_p_D: fp32, in (0, 1].
        min_p_D: fp32, in [0, 1].
        top_k_D: int32; 0 keeps all tokens.
        uniforms_D: fp64 in [0, 1).
    """
    count, size = len(rows_D), logits_RV.shape[-1]
    tokens_D = torch.empty(count, dtype=torch.int64, device=logits_RV.device)
    weights_DV = torch.empty(count, size, dtype=torch.float32, device=logits_RV.device)
    # Triton launches kernels on the current device.
    current = torch.cuda.device(logits_RV.device) if logits_RV.is_cuda else nullcontext()
    with current:
        sampling_kernels.draw[(count,)](
            logits_RV,
            rows_D,
            temperatures_D,
            top_k_D,
            top_p_D,
            min_p_D,
            uniforms_D,
            weights_DV,
            tokens_D,
            logits_RV.stride(0),
            SIZE=size,
            BLOCK=BLOCK,
            DRAW_BLOCK=DRAW_BLOCK,
            num_warps=WARPS,
        )
    return tokens_D
