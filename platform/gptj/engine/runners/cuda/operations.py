"""What a step does, as four operations, each of which has two forms.

`plain` is PyTorch, on any device; `kernels` is Triton. Shapes, as the ends of names: R sequences,
T tokens, P pages of a sequence, D width, H heads, K head width, I inner width of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gptj.engine.runners.base import PageCopy
from gptj.engine.runners.cuda.weights import Norm, Weights

TILE = 32  # tokens of a chunk that one program of the kernel attends with


@dataclass(frozen=True)
class Chunk:
    """Several new tokens of one sequence."""

    row: int  # of the page tables
    start: int  # its first token of the step
    tokens: int
    position: int  # of the first


@dataclass(frozen=True)
class Inputs:
    """A step's numbers, int32 on the device; those on the host say how many there are.

    The first `num_decodes` sequences have one token each, their tokens are the first of the step,
    and all others are chunks.
    """

    ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor  # where keys and values go: page * page size + place
    page_table_RP: Tensor  # pages of each sequence, in order
    num_decodes: int
    chunks: tuple[Chunk, ...] = ()
    tiles_N4: Tensor | None = None  # chunks cut to TILE tokens: as Chunk
    logits_indices_W: Tensor | None = None  # the tokens after which logits are wanted; None: all


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of a layer: (pages, H, page size, K), a head's share of a page in one."""

    keys: Tensor
    values: Tensor


class Operations(Protocol):
    """Sums, norms, rotations and softmax are computed in fp32, and rounded once."""

    def prepare(self, weights: Weights) -> None:
        """Choose what is fastest for these weights, on a GPU; before the first step or never."""

    def multiply(self, x_TC: Tensor, weight: Tensor, *, wide: bool = False) -> Tensor:
        """x (T, inputs) by weight (columns, inputs): (T, columns).

        Args:
            wide: the sums stay in fp32; otherwise they are rounded to the weight's dtype.
        """

    def add_and_norm(
        self, x_TD: Tensor, added_TD: Tensor | None, bias_D: Tensor | None, norm: Norm
    ) -> Tensor:
        """Add to the fp32 residual stream, in place, and return its layer norm.

        Args:
            added_TD: what the last layer's matrix product gave, of any dtype, and
            bias_D: its bias; or None before the first layer.
        """

    def rope_and_cache(
        self,
        qkv_fc_in: Tensor,
        bias_I: Tensor,
        rotary: tuple[Tensor, Tensor],
        inputs: Inputs,
        cache: LayerCache,
        attn_mlp: Tensor,
    ) -> Tensor:
        """Deal out the first matrix product of a layer; returns the rotated queries (T, H, K).

        Args:
            qkv_fc_in: (T, 3D + I): queries, keys, values and the MLP's inner values.
            bias_I: of the inner values.
            rotary: sines and cosines (positions, rotated / 2).
            cache: gets rotated keys, and values.
            attn_mlp: (T, D + I), of which the last I columns get the activated inner values.
        """

    def paged_attention(
        self, q_THK: Tensor, inputs: Inputs, cache: LayerCache, attn_mlp: Tensor
    ) -> None:
        """Let each token see its sequence up to itself; into the first D columns of `attn_mlp`."""

    def copy_pages(self, cache: Tensor, copies: Sequence[PageCopy]) -> None:
        """Copy in all layers, in any order.

        Args:
            cache: (2, layers, pages, H, page size, K).
            copies: of which none reads or writes what another one writes.
        """
