"""The Runner protocol, and its reference in PyTorch: one step of the model over a paged KV cache.

Tokens of several sequences in, logits (W, V) out, on any device. Shape suffixes: R sequences,
T tokens of this step, W rows of logits, P pages of a sequence, S positions of a sequence's context,
D width, H heads, K head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gptj.config import GPTJConfig
from gptj.engine.runners.lora import (
    NONE,
    LoRAPair,
    LoRAWeights,
    TokenGroup,
    project,
)
from gptj.engine.runners.wide import multiply_wide, wide_sums
from gptj.model import GPTJForCausalLM, Rotary, activate

Ints = npt.NDArray[np.int32]

PAGE_SIZE = 16  # positions


@dataclass(frozen=True)
class StepBatch:
    """The new tokens of several sequences, concatenated without padding."""

    ids_T: Ints
    positions_T: Ints  # within its sequence; consecutive
    query_start_loc: Ints  # (R + 1): sequence r has tokens loc[r]:loc[r + 1], at least one
    page_table_RP: Ints  # each sequence's pages, in order; entries beyond its context are not read
    logits_indices: Ints  # (W): the tokens to return logits for, in this order
    adapters_R: Ints | None = None  # slot of each sequence's adapter, or NONE; None: no adapters
    # On the device of an asynchronous runner: replaces the first ids_T, not known to the host yet.
    device_ids: Tensor | None = None

    def slot(self, row: int) -> int:
        """The slot of a sequence's adapter."""
        return NONE if self.adapters_R is None else int(self.adapters_R[row])

    @property
    def slots_T(self) -> Ints:
        """The slot of each token's adapter."""
        if self.adapters_R is None:
            return np.full(len(self.ids_T), NONE, dtype=np.int32)
        return np.repeat(self.adapters_R, np.diff(self.query_start_loc))

    def check(self, config: GPTJConfig, page_size: int, num_pages: int) -> None:
        """Validate indices; kernels do not, and would access memory out of bounds."""
        for array in (
            self.ids_T,
            self.positions_T,
            self.query_start_loc,
            self.page_table_RP,
            self.logits_indices,
        ):
            assert array.dtype == "int32" and array.flags.c_contiguous
        assert self.ids_T.min() >= 0 and self.ids_T.max() < config.vocab_size
        last = int(self.positions_T.max())
        assert self.positions_T.min() >= 0 and last < config.n_positions
        assert last < self.page_table_RP.shape[1] * page_size
        assert self.page_table_RP.min() >= 0 and self.page_table_RP.max() < num_pages
        assert self.query_start_loc[0] == 0 and self.query_start_loc[-1] == len(self.ids_T)
        assert len(self.page_table_RP) == len(self.query_start_loc) - 1
        if self.adapters_R is not None:
            assert len(self.adapters_R) == len(self.page_table_RP)


class PageCopy(NamedTuple):
    """Copies the first `filled` positions of page `source` to page `target`, in all layers."""

    source: int
    target: int
    filled: int


def independent(copies: Sequence[PageCopy]) -> Iterator[list[PageCopy]]:
    """Group copies so that each group can be made in any order or in parallel.

    A page may have been freed and reallocated between copies, so order matters between groups.
    """
    run: list[PageCopy] = []
    read: set[int] = set()
    written: set[int] = set()
    for copy in copies:
        if copy.source in written or copy.target in read or copy.target in written:
            yield run
            run, read, written = [], set(), set()
        run.append(copy)
        read.add(copy.source)
        written.add(copy.target)
    if run:
        yield run


class Draw(Protocol):
    """Draws a token for each of some rows, as `cuda.sampling.draw` does."""

    def __call__(
        self,
        logits_RV: Tensor,
        rows_D: Tensor,
        temperatures_D: Tensor,
        top_k_D: Tensor,
        top_p_D: Tensor,
        min_p_D: Tensor,
        uniforms_D: Tensor,
    ) -> Tensor: ...


class Runner(Protocol):
    """A model with a paged KV cache; not thread-safe."""

    config: GPTJConfig
    device: torch.device  # of the logits
    page_size: int  # positions of a page
    num_pages: int
    # Whether `step` returns before its logits are computed. The device executes steps, copies,
    # loads and resets in the order of the calls: pages and slots may be reused by later ones.
    asynchronous: bool
    draw: Draw | None  # samples from logits of `step`; None: PyTorch does

    def step(self, batch: StepBatch) -> Tensor:
        """Cache the tokens' keys and values, and return logits (W, V) in fp32.

        A token at position p is stored in its sequence's page p // page_size, slot p % page_size,
        and attends to its sequence's positions 0 to p.
        """

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Make the copies in order."""

    def load_adapter(self, slot: int, weights: LoRAWeights) -> None:
        """Put an adapter into a slot that no sequence uses; any thread may call this.

        A launched step may still read the slot: an asynchronous device loads after it.
        """

    def reset(self) -> None:
        """Clear the cache, after a failed step."""

    def close(self) -> None:
        """Free the runner's memory."""


class ResizableRunner(Runner, Protocol):
    def resize(self, num_pages: int) -> None:
        """Replace the cache by an empty one of `num_pages` pages."""


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
        with wide_sums():
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
        wanted_WD = x_TD[self._on_device(batch.logits_indices)]
        head = self._model.lm_head
        logits_WV = multiply_wide(self._model.transformer.ln_f(wanted_WD), head.weight)
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
