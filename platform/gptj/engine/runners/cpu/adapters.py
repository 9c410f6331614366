"""Adapters in the CPU kernels' layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gptj.engine.runners.cpu import library
from gptj.engine.runners.lora import LoRAPair, LoRAWeights

LANES = 16  # numbers of a vector
# A layer's pairs, as step.cpp numbers them.
PAIRS = ("q_proj", "k_proj", "v_proj", "fc_in", "out_proj", "fc_out")


@dataclass(frozen=True)
class PackedAdapter:
    layers: Any  # LoraLayer[]
    kept: list[Tensor]  # which it points to


def pack_adapter(weights: LoRAWeights) -> PackedAdapter:
    """A as it is, and B with 16 columns of each rank contiguous: a product reads it in sequence."""
    kept: list[Tensor] = []
    layers = (library.LoraLayer * len(weights.layers))()
    for layer, pairs in zip(layers, weights.layers, strict=True):
        for number, name in enumerate(PAIRS):
            if (pair := pairs.get(name)) is not None:
                a, b = pair.a_RI.contiguous(), _blocks(pair)
                kept += [a, b]
                layer.pairs[number] = library.LoraPair(a.data_ptr(), b.data_ptr(), weights.rank)
    return PackedAdapter(layers, kept)


def _blocks(pair: LoRAPair) -> Tensor:
    """B as (outputs / 16, rank, 16)."""
    blocks: Tensor = pair.b_OR.unflatten(0, (-1, LANES))
    return blocks.transpose(1, 2).contiguous()
