"""Adapters in the GPU's runner: all slots' matrices at fixed addresses, for CUDA graphs.

A layer's modules belong to its two fused products: q_proj, k_proj, v_proj and fc_in share inputs,
with columns side by side; out_proj and fc_out share columns, with inputs side by side. Shape
suffixes: S slots, R rank, O columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from gptj.config import GPTJConfig
from gptj.engine.runners.lora import LoRALimits, LoRAPair, LoRAWeights

FIRST = ("q_proj", "k_proj", "v_proj", "fc_in")
SECOND = ("out_proj", "fc_out")
MIN_RANK = 8  # of a slot: the kernels' block size


@dataclass(frozen=True)
class Ranks:
    """Rank of the adapter in each slot."""

    on_device_S: Tensor  # int32
    on_host: list[int]

    @classmethod
    def empty(cls, limits: LoRALimits, device: torch.device) -> Ranks:
        slots = limits.max_loras
        return cls(torch.zeros(slots, dtype=torch.int32, device=device), [0] * slots)


@dataclass(frozen=True)
class Adapted:
    """All slots' matrices beside a fused product.

    Attributes:
        a: (S, RANK * all inputs): each module's A (RANK, inputs), one after another.
        b: (S, columns, RANK) if columns are side by side, else (S, columns, modules * RANK).
            Rows and columns beyond an adapter's rank are 0.
        inputs: of each module.
        columns: of each module.
        beside: whether inputs are side by side; otherwise columns are.
    """

    a: Tensor
    b: Tensor
    ranks: Ranks
    rank: int  # RANK, a power of 2
    inputs: tuple[int, ...]
    columns: tuple[int, ...]
    beside: bool

    @classmethod
    def empty(
        cls,
        slots: int,
        rank: int,
        ranks: Ranks,
        inputs: tuple[int, ...],
        columns: tuple[int, ...],
        dtype: torch.dtype,
        *,
        beside: bool,
    ) -> Adapted:
        device = ranks.on_device_S.device
        rows, terms = (columns[0], len(inputs)) if beside else (sum(columns), 1)
        a = torch.zeros(slots, rank * sum(inputs), dtype=dtype, device=device)
        b = torch.zeros(slots, rows, terms * rank, dtype=dtype, device=device)
        return cls(a, b, ranks, rank, inputs, columns, beside)

    def put(self, slot: int, pairs: list[LoRAPair | None]) -> None:
        """Replace a slot's matrices; None is a module without an adapter."""
        for module, pair in enumerate(pairs):
            for number, target in enumerate(self._matrices(slot, module)):
                target.zero_()
                if pair is not None:
                    matrix = (pair.a_RI, pair.b_OR)[number]
                    target[: len(matrix), : matrix.shape[1]] = matrix.to(target)

    def add(self, y_TO: Tensor, x_TI: Tensor, slot: int) -> None:
        """Add a slot's products, in place, for tokens that all have its adapter."""
        rank = self.ranks.on_host[slot]
        for module in range(len(self.inputs)):
            a_RI, b_OR = self._matrices(slot, module)
            own_x, own_y = x_TI, y_TO
            if self.beside:
                start = sum(self.inputs[:module])
                own_x = x_TI[:, start : start + self.inputs[module]]
            else:
                start = sum(self.columns[:module])
                own_y = y_TO[:, start : start + self.columns[module]]
            own_y += F.linear(F.linear(own_x, a_RI[:rank]), b_OR[:, :rank])

    def _matrices(self, slot: int, module: int) -> tuple[Tensor, Tensor]:
        """Views of a module's A (RANK, inputs) and B (columns, RANK)."""
        starts = [0, *accumulate(self.rank * inputs for inputs in self.inputs)]
        a_RI = self.a[slot, starts[module] : starts[module + 1]].view(self.rank, -1)
        if self.beside:
            return a_RI, self.b[slot, :, module * self.rank : (module + 1) * self.rank]
        start = sum(self.columns[:module])
        return a_RI, self.b[slot, start : start + self.columns[module]]


@dataclass(frozen=True)
class AdaptedLayer:
    qkv_fc_in: Adapted
    out_proj_fc_out: Adapted

    @classmethod
    def empty(
        cls, config: GPTJConfig, limits: LoRALimits, dtype: torch.dtype, ranks: Ranks
    ) -> AdaptedLayer:
        width, inner = config.n_embd, config.inner_dim
        rank = max(MIN_RANK, 1 << (limits.max_lora_rank - 1).bit_length())

        def adapted(inputs: tuple[int, ...], columns: tuple[int, ...], *, beside: bool) -> Adapted:
            slots = limits.max_loras
            return Adapted.empty(slots, rank, ranks, inputs, columns, dtype, beside=beside)

        return cls(
            adapted((width,) * 4, (width, width, width, inner), beside=False),
            adapted((width, inner), (width, width), beside=True),
        )


class LoRASlots:
    """Room for adapters on a device.

    Args:
        dtype: of the model.
    """

    def __init__(
        self, config: GPTJConfig, limits: LoRALimits, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._ranks = Ranks.empty(limits, device)
        self.layers = tuple(
            AdaptedLayer.empty(config, limits, dtype, self._ranks) for _ in range(config.n_layer)
        )

    def put(self, slot: int, weights: LoRAWeights) -> None:
        for layer, pairs in zip(self.layers, weights.layers, strict=True):
            layer.qkv_fc_in.put(slot, _of(pairs, FIRST))
            layer.out_proj_fc_out.put(slot, _of(pairs, SECOND))
        self._ranks.on_host[slot] = weights.rank
        self._ranks.on_device_S[slot] = weights.rank


def _of(pairs: Mapping[str, LoRAPair], modules: tuple[str, ...]) -> list[LoRAPair | None]:
    return [pairs.get(module) for module in modules]
