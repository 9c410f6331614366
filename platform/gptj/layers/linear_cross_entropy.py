"""Fused language-model head and loss: hidden states (N, D) and labels (N) in, a summed loss out.

The full logits (N, V) are never materialized: with a vocabulary of 50,400, one sequence's logits
are larger than everything a block keeps. They are computed in chunks of rows, and each chunk's
gradients are accumulated immediately. The idea is Liger Kernel's (Hsu et al., 2024,
https://arxiv.org/abs/2410.10989); PyTorch's own linear_cross_entropy returns the loss in the
weights' precision, but bf16 cannot hold a sum over thousands of tokens.

Shapes: N positions, C positions per chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_NUMBERS = 2**24  # logits per chunk: 64 MiB in fp32
IGNORED_LABEL = -100  # positions with this label are not trained on


class LanguageModelHead(nn.Linear):
    """nn.Linear to the vocabulary; with labels, returns the cross-entropy of its logits instead.

    The loss is computed inside the module because ZeRO-3 gathers a module's weights only during
    its forward pass.
    """

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(x)
        return linear_cross_entropy(x.flatten(0, -2), self.weight, self.bias, labels.flatten())


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    *,
    chunk_rows: int | None = None,
) -> Tensor:
    """Cross-entropy of `x @ weight.T + bias` in fp32, summed over labels other than IGNORED_LABEL.

    Loss and gradients equal F.cross_entropy's on fp32 logits, up to the order of summation. Needs
    memory for one chunk of logits besides the gradients; a half-precision weight's gradient is
    accumulated in fp32.

    Args:
        chunk_rows: positions per chunk; default: as many as CHUNK_NUMBERS allows.
    """
    rows = chunk_rows or max(1, CHUNK_NUMBERS // len(weight_VD))
    needed = [
        torch.is_grad_enabled() and each is not None and each.requires_grad
        for each in (x_ND, weight_VD, bias_V)
    ]
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_ND, weight_VD, bias_V, labels_N, rows, needed
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes gradients in the forward pass, while the logits exist.

    The backward pass only scales them, so nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        rows: int,
        needed: list[bool],
    ) -> Tensor:
        for_x, for_weight, for_bias = needed
        place: dict[str, Any] = {"device": x_ND.device, "dtype": torch.float32}
        loss = torch.zeros((), **place)
        grad_x = torch.empty_like(x_ND) if for_x else None
        grad_weight = torch.zeros(weight_VD.shape, **place) if for_weight else None
        grad_bias = torch.zeros(len(weight_VD), **place) if for_bias else None
        buffer = torch.empty(min(rows, len(x_ND)), len(weight_VD), **place)
        starts = range(0, len(x_ND), rows)
        if x_ND.is_meta:  # only memory is measured there, and later chunks use no more
            starts = starts[:3]
        for start in starts:
            x_CD, labels_C = x_ND[start : start + rows], labels_N[start : start + rows]
            counted_C = labels_C != IGNORED_LABEL
            index_C1 = labels_C.masked_fill(~counted_C, 0)[:, None]
            logits_CV = _logits(x_CD, weight_VD, bias_V, buffer[: len(x_CD)])
            logits_CV -= logits_CV.amax(dim=-1, keepdim=True)
            label_logits_C = logits_CV.gather(-1, index_C1)[:, 0]
            sums_C = logits_CV.exp_().sum(dim=-1)
            loss += ((sums_C.log() - label_logits_C) * counted_C).sum()
            if not any(needed):
                continue
            # d(loss) / d(logits): the softmax, minus 1 at the label.
            grad_CV = logits_CV.mul_((counted_C / sums_C)[:, None])
            grad_CV.scatter_add_(-1, index_C1, -counted_C[:, None].float())
            if grad_bias is not None:
                grad_bias += grad_CV.sum(dim=0)
            grad_CV = grad_CV.to(x_ND.dtype)
            if grad_x is not None:
                torch.mm(grad_CV, weight_VD, out=grad_x[start : start + rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad_CV, x_CD)
        ctx.gradients = [grad_x, grad_weight, grad_bias]
        ctx.dtypes = [x_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss supports one backward pass: run forward again")
        gradients, ctx.gradients = ctx.gradients, None  # modified in place below
        found: list[Tensor | None] = []
        while gradients:
            gradient = gradients.pop(0)
            dtype = ctx.dtypes[len(found)]
            if gradient is not None:
                # The loss scale may overflow fp16.
                wide = gradient.float() if gradient.dtype == torch.float16 else gradient
                gradient = wide.mul_(grad_loss).to(dtype)
            found.append(gradient)
        return *found, None, None, None


def _logits(x_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, out: Tensor) -> Tensor:
    """Write fp32 logits (C, V) into `out`, rounded like the head's own."""
    if x_CD.dtype != torch.float32:
        return out.copy_(F.linear(x_CD, weight_VD, bias_V))
    if bias_V is None:
        return torch.mm(x_CD, weight_VD.T, out=out)
    return torch.addmm(bias_V, x_CD, weight_VD.T, out=out)


def _add_product(sum_VD: Tensor, grad_CV: Tensor, x_CD: Tensor) -> None:
    """sum += grad.T @ x; in slices if the dtypes differ, since the product then needs a buffer."""
    if sum_VD.dtype == x_CD.dtype:
        sum_VD.addmm_(grad_CV.T, x_CD)
        return
    entries = max(1, CHUNK_NUMBERS // x_CD.shape[1])
    for start in range(0, len(sum_VD), entries):
        part = slice(start, start + entries)
        sum_VD[part] += grad_CV[:, part].T @ x_CD
