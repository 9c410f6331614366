"""Selective activation checkpointing: a block that keeps the outputs of its large operations.

The backward pass computes the others again: norm, rotation, activation, dropout.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._flash_attention_forward.default,  # of packed documents
}


def checkpoint_selectively(
    block: nn.Module, x_BLD: Tensor, *arguments: Any, attention_dropout: float
) -> Any:
    """`block(x_BLD, *arguments)`, of which the backward pass computes again what costs little.

    The block may change no product's output in place: PyTorch does not always notice.

    Args:
        attention_dropout: its probability. Attention with dropout is computed again: if it were
            not, later dropouts would draw other numbers than in the forward pass.
    """
    kept = _PRODUCTS if attention_dropout else _PRODUCTS | _ATTENTION
    contexts = partial(
        create_selective_checkpoint_contexts, partial(_policy, kept, x_BLD.shape[-1])
    )
    return checkpoint(block, x_BLD, *arguments, use_reentrant=False, context_fn=contexts)


def _policy(
    kept: set[Any],
    width: int,
    context: SelectiveCheckpointContext,
    operator: Any,
    *arguments: Any,
    **keywords: Any,
) -> CheckpointPolicy:
    """Of products, all but the MLP's last: no gradient needs its output, so it is not repeated."""
    if operator in kept and not (operator in _PRODUCTS and arguments[-1].shape[-2] > width):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
