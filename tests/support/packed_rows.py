"""The documents of packed rows, each by itself: what packing must not change."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


def documents_alone(batch: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """`input_ids` and `labels` (1, length) of each document, and where it is in all positions."""
    ids, labels, real = (batch[key].flatten() for key in ("input_ids", "labels", "attention_mask"))
    length = batch["input_ids"].shape[1]
    ends = batch.get("cu_seqlens", torch.arange(0, len(ids) + 1, length)).tolist()
    for start, end in pairwise(ends):
        end = start + int(real[start:end].sum())
        if end > start:
            yield ids[None, start:end], labels[None, start:end], slice(start, end)


def loss_alone(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss of a batch's labels, from a model that computes one document at a time."""
    total, items = torch.zeros(()), 0
    for ids, labels, _ in documents_alone(batch):
        logits = model(ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits, labels[0, 1:], ignore_index=IGNORED, reduction="sum"
        )
        items += int((labels[0, 1:] != IGNORED).sum())
    return total / items
