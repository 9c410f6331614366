"""The operations of a step, implemented in Triton (`launch`) and, for tests, in PyTorch.

Shape suffixes: R sequences, T tokens, P pages of a sequence, D width, H heads, K head width,
I inner width of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gptj.config import GPTJConfig
from gptj.engine.runners.base import PAGE_SIZE, Draw, PageCopy
from gptj.engine.runners.cuda.fp8 import FP8, Product
from gptj.engine.runners.cuda.lora import Adapted
from gptj.engine.runners.cuda.weights import Matrix, Norm, Weights
from gptj.engine.runners.lora import NONE

MAX_GROUP = 16  # most decoding tokens that read the pages they share together


@dataclass(frozen=True)
class Chunk:
    """A prefill chunk: new tokens of one sequence."""

    row: int  # of the page tables
    start: int  # index in the step of its first token
    tokens: int
    position: int  # position of the first token
    adapter: int = NONE  # its slot


@dataclass(frozen=True)
class Inputs:
    """A step's inputs: int32 tensors on the device, and sizes as Python ints.

    The step starts with one token of each of the first `num_decodes` sequences; all others are
    prefill chunks.
    """

    ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor  # of keys and values: page * page size + offset
    page_table_RP: Tensor  # each sequence's pages, in order
    # Decoding sequences that share pages form groups. Of the first of a group: for how many that
    # follow it also attends, and to how many pages. Of the others: -1, and how many pages.
    # Of a sequence without a group: 0, 0.
    groups_R2: Tensor
    num_decodes: int
    chunks: tuple[Chunk, ...] = ()
    tiles_N4: Tensor | None = None  # chunks in tiles of `Operations.tile` tokens, each as Chunk
    adapters_T: Tensor | None = None  # slot of each token's adapter, or NONE
    logits_indices_W: Tensor | None = None  # the tokens to compute logits for; None: all


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of a layer, both (pages, H, page size, K).

    In fp8 (e4m3) each head of a token has a scale (`fp8.scales_for`): both fp32 (pages, H, page
    size).
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


@dataclass(frozen=True)
class Cache:
    """Keys and values of all layers, with one address for each as long as it lives."""

    data: Tensor  # (2, layers, pages, H, page size, K)
    # Of data in fp8: fp32 (2, layers, pages, H, page size). Attention divides by the largest,
    # so that none is 0, not even of unused places.
    scales: Tensor | None

    @classmethod
    def zeros(
        cls, config: GPTJConfig, layers: int, pages: int, dtype: torch.dtype, device: torch.device
    ) -> Cache:
        """A cache of zeros.

        Args:
            dtype: FP8, or that of the queries.
        """
        shape = (2, layers, pages, config.n_head, PAGE_SIZE)
        data = torch.zeros(*shape, config.head_dim, dtype=dtype, device=device)
        scales = None
        if dtype == FP8:
            scales = torch.ones(shape, dtype=torch.float32, device=device)
        return cls(data, scales)

    def zero_(self) -> None:
        self.data.zero_()
        if self.scales is not None:
            self.scales.fill_(1)

    def layers(self) -> list[LayerCache]:
        parts = [each for each in (self.data, self.scales) if each is not None]
        by_layer = zip(*(part.unbind(1) for part in parts), strict=True)
        return [LayerCache(*(part for pair in layer for part in pair)) for layer in by_layer]


class Operations(Protocol):
    """Sums, norms, rotary embedding and softmax are computed in fp32 and rounded once."""

    tile: int  # query tokens of one program of prefill attention
    draw: Draw | None

    def prepare(self, weights: Weights) -> None:
        """Tune for these weights on a GPU; optional, before the first step."""

    def multiply(self, x_TC: Tensor, weight: Matrix, *, wide: bool = False) -> Product:
        """x (T, inputs) by weight (columns, inputs): (T, columns).

        Args:
            wide: return fp32; otherwise round to x's dtype.
        """

    def add_and_norm(
        self, x_TD: Tensor, added_TD: Product | None, bias_D: Tensor | None, norm: Norm
    ) -> Tensor:
        """Add to the fp32 residual stream, in place, and return its layer norm.

        Args:
            added_TD: the previous layer's output, of any dtype; None before the first layer.
            bias_D: its bias.
        """

    def rope_and_cache(
        self,
        qkv_fc_in: Product,
        bias_I: Tensor,
        rotary: tuple[Tensor, Tensor],
        inputs: Inputs,
        cache: LayerCache,
        attn_mlp: Tensor,
    ) -> Tensor:
        """Apply rotary embedding, cache keys and values, and activate the MLP's inner values.

        Returns the rotated queries (T, H, K).

        Args:
            qkv_fc_in: (T, 3D + I): the layer's first product: queries, keys, values, fc_in.
            bias_I: fc_in's.
            rotary: sines and cosines (positions, rotated / 2).
            cache: receives the rotated keys, and the values.
            attn_mlp: (T, D + I): its last I columns receive the activations.
        """

    def paged_attention(
        self, q_THK: Tensor, inputs: Inputs, cache: LayerCache, attn_mlp: Tensor
    ) -> None:
        """Causal attention over each sequence's pages, into the first D columns of `attn_mlp`."""

    def add_lora(self, y_TO: Product, x_TI: Tensor, adapted: Adapted, inputs: Inputs) -> Tensor:
        """Add the products of each token's adapter to `multiply`'s, in place, and return the sum.

        Args:
            inputs: with adapters_T.
        """

    def copy_pages(self, cache: Cache, copies: Sequence[PageCopy]) -> None:
        """Copy pages in all layers, in any order.

        Args:
            copies: independent: none reads or writes a page that another writes.
        """
