"""The Runner in PyTorch, the reference of the runners with kernels.

Shape suffixes as in gptj.engine.runners.base, and S positions of a sequence's context, D width,
H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gptj.engine.runners.base import PAGE_SIZE, Draw, PageCopy, StepBatch
from gptj.engine.runners.fp32_matmul import fp32_reduction, matmul_fp32
from gptj.engine.runners.lora import (
    NONE,
    LoRAPair,
    LoRAWeights,
    TokenGroup,
    project,
)
from gptj.model import GPTJForCausalLM, Rotary, activate


class TorchRunner:
    """The model's own modules, with attention over each sequence's gathered pages.

    Args:
        model: in evaluation mode, on its device.
        num_pages: of the cache; each holds PAGE_SIZE positions of all layers.
    """

    page_size = PAGE_SIZE
    asynchronous = False
    draw: Draw | None = None

    def __init__(self, model: GPTJForCausalLM, num_pages: int) -> None:
        self.config = model.config
        self.device = model.device
        self._model = model
        self._adapters: dict[int, LoRAWeights] = {}  # by slot, in the model's dtype
        self.resize(num_pages)

    def resize(self, num_pages: int) -> None:
        self.num_pages = num_pages
        config = self.config
        shape = (config.n_layer, num_pages, PAGE_SIZE, config.n_head, config.head_dim)
        self._keys = self._values = torch.empty(0)  # free the old cache first
        self._keys = torch.zeros(shape, dtype=self._model.dtype, device=self.device)
        self._values = torch.zeros_like(self._keys)

    def step(self, batch: StepBatch) -> Tensor:
        with fp32_reduction():
            return self._step(batch)

    def _step(self, batch: StepBatch) -> Tensor:
        ids_T = self._on_device(batch.ids_T)
        positions_T = self._on_device(batch.positions_T)
        rotary = Rotary.at(positions_T[None], self.config)
        lengths = np.diff(batch.query_start_loc)
        pages_T = batch.page_table_RP[
            np.repeat(np.arange(len(lengths)), lengths), batch.positions_T // PAGE_SIZE
        ]
        places_T = self._on_device(pages_T * PAGE_SIZE + batch.positions_T % PAGE_SIZE)
        contexts = self._contexts(batch, positions_T)
        groups = self._groups(batch)
        x_TD = self._model.transformer.wte(ids_T)
        for layer, block in enumerate(self._model.transformer.h):
            x_TD = self._block(block, layer, x_TD, rotary, places_T, contexts, groups)
        hidden_WD = x_TD[self._on_device(batch.logits_indices)]
        head = self._model.lm_head
        logits_WV = matmul_fp32(self._model.transformer.ln_f(hidden_WD), head.weight)
        logits_WV += head.bias
        return logits_WV

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        for source, target, filled in copies:
            for cache in (self._keys, self._values):
                cache[:, target, :filled] = cache[:, source, :filled]

    def load_adapter(self, slot: int, weights: LoRAWeights) -> None:
        self._adapters[slot] = replace(
            weights,
            layers=tuple(
                {
                    name: LoRAPair(*map(self._as_weight, (pair.a_RI, pair.b_OR)))
                    for name, pair in layer.items()
                }
                for layer in weights.layers
            ),
        )

    def reset(self) -> None:
        self._keys.zero_()
        self._values.zero_()

    def close(self) -> None:
        del self._keys, self._values

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.to(self.device, self._model.dtype)

    def _groups(self, batch: StepBatch) -> list[TokenGroup]:
        """The step's tokens grouped by adapter."""
        if batch.adapters_R is None:
            return []
        slots_T = batch.slots_T
        return [
            TokenGroup(self._adapters[slot], self._on_device(np.flatnonzero(slots_T == slot)))
            for slot in np.unique(slots_T).tolist()
            if slot != NONE
        ]

    def _contexts(self, batch: StepBatch, positions_T: Tensor) -> list[_Context]:
        page_table_RP = self._on_device(batch.page_table_RP)
        places_S = torch.arange(self.config.n_positions, device=self.device)
        contexts = []
        for row, (start, end) in enumerate(pairwise(batch.query_start_loc.tolist())):
            length = int(batch.positions_T[end - 1]) + 1
            pages = page_table_RP[row, : -(-length // PAGE_SIZE)]
            visible_LS = places_S[:length] <= positions_T[start:end, None]
            contexts.append(_Context(slice(start, end), length, pages, visible_LS))
        return contexts

    def _block(
        self,
        block: Any,
        layer: int,
        x_TD: Tensor,
        rotary: Rotary,
        places_T: Tensor,
        contexts: Sequence[_Context],
        groups: list[TokenGroup],
    ) -> Tensor:
        h_TD = block.ln_1(x_TD)
        attn, mlp = block.attn, block.mlp

        def linear(parent: Any, name: str, x_TI: Tensor) -> Tensor:
            return project(getattr(parent, name), name, layer, x_TI, groups)

        q_THK = rotary.rotate(linear(attn, "q_proj", h_TD).unflatten(-1, (attn.heads, -1))[None])[0]
        k_THK = rotary.rotate(linear(attn, "k_proj", h_TD).unflatten(-1, (attn.heads, -1))[None])[0]
        keys, values = self._keys[layer], self._values[layer]
        keys.flatten(0, 1)[places_T] = k_THK
        values.flatten(0, 1)[places_T] = linear(attn, "v_proj", h_TD).unflatten(
            -1, (attn.heads, -1)
        )
        attended = [
            # PyTorch's fused kernels need four dimensions.
            F.scaled_dot_product_attention(
                q_THK[context.tokens].transpose(0, 1)[None],
                keys[context.pages].flatten(0, 1)[: context.length].transpose(0, 1)[None],
                values[context.pages].flatten(0, 1)[: context.length].transpose(0, 1)[None],
                attn_mask=context.visible_LS[None, None],
            )[0].transpose(0, 1)
            for context in contexts
        ]
        attended_TD = linear(attn, "out_proj", torch.cat(attended).flatten(1))
        inner_TI = activate(linear(mlp, "fc_in", h_TD), mlp.activation)
        return x_TD + attended_TD + linear(mlp, "fc_out", inner_TI)

    def _on_device(self, numbers: npt.NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self.device)


@dataclass(frozen=True)
class _Context:
    """The context that one sequence's new tokens attend to."""

    tokens: slice  # of this step
    length: int
    pages: Tensor
    visible_LS: Tensor
