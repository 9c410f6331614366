"""Causal attention within concatenated documents, without a mask or padding.

T tokens of all documents, H heads, K head width. Half precision on GPUs uses PyTorch's varlen_attn
(FlashAttention); elsewhere documents of equal length are batched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gptj.environment.extras import Extra

if TYPE_CHECKING:
    from torch.nn.attention import varlen
else:  # importing it loads PyTorch's compiler, which takes a second
    varlen = Extra("torch.nn.attention.varlen", "packed documents on a GPU", "torch")

FLASH_WIDTH = 256  # largest head width
FLASH_CAPABILITY = (8, 0)  # a T4 (7.5) trains in fp16 without FlashAttention


@dataclass(frozen=True)
class DocumentBorders:
    """Where documents begin and end; shared by all layers."""

    cu_seqlens: Tensor  # (N + 1) int32: document i is [cu_seqlens[i], cu_seqlens[i + 1])
    positions_T: Tensor  # each token's position in its document
    longest: int  # upper bound on document length

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int, longest: int) -> DocumentBorders:
        """ValueError if documents do not cover all tokens; unchecked on a GPU, to avoid a sync."""
        if cu_seqlens.device.type == "cpu" and not (
            cu_seqlens.dim() == 1
            and len(cu_seqlens) > 1
            and cu_seqlens[0] == 0
            and cu_seqlens[-1] == tokens
            and 0 < int(cu_seqlens.diff().min()) <= int(cu_seqlens.diff().max()) <= longest
        ):
            raise ValueError(
                f"cu_seqlens must increase from 0 to batch * length = {tokens} in steps of at most "
                f"{longest}, got {cu_seqlens}"
            )
        all_T = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        starts_T = cu_seqlens[torch.searchsorted(cu_seqlens, all_T, right=True) - 1]
        return cls(cu_seqlens, (all_T - starts_T).long(), longest)

    def by_length(self) -> DocumentsByLength:
        """Group documents by length; synchronizes with the device."""
        starts = self.cu_seqlens[:-1].long()
        lengths = self.cu_seqlens.diff().long()
        order = torch.argsort(lengths, stable=True)
        counted = torch.unique_consecutive(lengths[order], return_counts=True)
        sizes = [(int(length), int(count)) for length, count in zip(*counted, strict=True)]
        places = [
            (starts[part, None] + torch.arange(length, device=starts.device)).flatten()
            for part, (length, _) in zip(
                order.split([count for _, count in sizes]), sizes, strict=True
            )
        ]
        order_T = torch.cat(places)
        return DocumentsByLength(order_T, torch.argsort(order_T), sizes)


@dataclass(frozen=True)
class DocumentsByLength:
    """A reordering that makes documents of equal length adjacent."""

    order_T: Tensor  # the original index of each reordered token
    back_T: Tensor  # the inverse permutation
    sizes: list[tuple[int, int]]  # (length, documents)


def attend_documents(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    borders: DocumentBorders,
    by_length: DocumentsByLength | None,
    dropout: float,
) -> Tensor:
    """Attention (T, H, K) of each token over its own document up to itself.

    Args:
        by_length: None: use FlashAttention; see `uses_flash`.
    """
    if by_length is None:
        longest = borders.longest
        found: Tensor = varlen.varlen_attn(  # type: ignore[assignment]  # without return_aux
            q_THK, k_THK, v_THK, borders.cu_seqlens, borders.cu_seqlens, longest, longest,
            window_size=(-1, 0),  # causal
        )  # fmt: skip
        return found
    split = [length * count for length, count in by_length.sizes]
    sorted_ = [
        each.index_select(0, by_length.order_T).split(split) for each in (q_THK, k_THK, v_THK)
    ]
    attended = []
    for (length, count), *parts in zip(by_length.sizes, *sorted_, strict=True):
        q_NHLK, k_NHLK, v_NHLK = (
            part.unflatten(0, (count, length)).transpose(1, 2) for part in parts
        )
        a_NHLK = F.scaled_dot_product_attention(
            q_NHLK, k_NHLK, v_NHLK, is_causal=True, dropout_p=dropout
        )
        attended.append(a_NHLK.transpose(1, 2).flatten(0, 1))
    return torch.cat(attended).index_select(0, by_length.back_T)


def uses_flash(x: Tensor, head_width: int, dropout: float) -> bool:
    """Whether FlashAttention applies: half precision, no dropout, on Ampere or later."""
    if x.device.type != "cuda" or x.dtype not in (torch.float16, torch.bfloat16) or dropout:
        return False
    if head_width > FLASH_WIDTH or head_width % 8:
        return False
    return torch.cuda.get_device_capability(x.device) >= FLASH_CAPABILITY
