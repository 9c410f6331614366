"""LoRA adapters in a runner: requests with different adapters share its steps.

A runner has numbered slots for adapters. A step's batch has the slot of each sequence's adapter,
and a token's products become W x + B A x with the matrices in its slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

NONE = -1  # the slot of a sequence without an adapter
MAX_RANK = 64  # of any runner


@dataclass(frozen=True)
class LoRALimits:
    """Limits of a runner's adapters, with vLLM's names.

    Raises:
        ValueError: naming the value and the valid ones.
    """

    max_loras: int = 8  # adapters in memory
    max_lora_rank: int = MAX_RANK

    def __post_init__(self) -> None:
        if self.max_loras < 1:
            raise ValueError(f"max_loras must be 1 or more, got {self.max_loras}")
        if not 1 <= self.max_lora_rank <= MAX_RANK:
            raise ValueError(f"max_lora_rank must be in [1, {MAX_RANK}], got {self.max_lora_rank}")


@dataclass(frozen=True)
class LoRAPair:
    """The two matrices beside a linear layer's."""

    a_RI: Tensor  # (rank, inputs)
    b_OR: Tensor  # (outputs, rank), multiplied by the adapter's scaling


@dataclass(frozen=True)
class LoRAWeights:
    """An adapter's matrices, in fp32 on the CPU."""

    rank: int
    layers: tuple[Mapping[str, LoRAPair], ...]  # by the linear layer's name, such as q_proj
    digest: bytes  # of all matrices


@dataclass(frozen=True)
class TokenGroup:
    """Tokens of a step that have the same adapter; not necessarily adjacent."""

    weights: LoRAWeights
    tokens: Tensor  # their indices


def project(
    linear: nn.Module, name: str, layer: int, x_TI: Tensor, groups: list[TokenGroup]
) -> Tensor:
    """Apply a layer's linear `name`, adding each group's low-rank product."""
    y_TO: Tensor = linear(x_TI)
    for group in groups:
        pair = group.weights.layers[layer].get(name)
        if pair is not None:
            small_GR = F.linear(x_TI[group.tokens], pair.a_RI)
            y_TO.index_add_(0, group.tokens, F.linear(small_GR, pair.b_OR))
    return y_TO
