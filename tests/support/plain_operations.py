"""The operations of a step in PyTorch, on any device: the reference for the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from gptj.engine.runners.base import Draw, PageCopy
from gptj.engine.runners.cuda.fp8 import FP8, Fp8Matrix, Product, quantized_rows
from gptj.engine.runners.cuda.lora import Adapted
from gptj.engine.runners.cuda.operations import Cache, Inputs, LayerCache
from gptj.engine.runners.cuda.quantized_matrix import QuantizedMatrix
from gptj.engine.runners.cuda.weights import Matrix, Norm, Weights
from gptj.engine.runners.fp32_matmul import matmul_fp32
from gptj.engine.runners.lora import NONE
from gptj.model import Rotary


def multiply_fp8(x_TC: Tensor, weight: Fp8Matrix) -> Tensor:
    """Both quantized, computed in fp32."""
    values, scales = quantized_rows(x_TC.float())
    return F.linear(values.float(), weight.values.float()) * scales[:, None] * weight.scales


class PlainOperations:
    """See Operations.

    Args:
        dtype: of the matrix products' inputs.
    """

    tile = 32
    draw: Draw | None = None

    def __init__(self, dtype: torch.dtype, epsilon: float) -> None:
        self._dtype = dtype
        self._epsilon = epsilon

    def prepare(self, weights: Weights) -> None:
        """There is nothing to tune."""

    def multiply(self, x_TC: Tensor, weight: Matrix, *, wide: bool = False) -> Tensor:
        if isinstance(weight, QuantizedMatrix):
            weight = weight.dequantized(x_TC.dtype)
        if isinstance(weight, Fp8Matrix):
            in_fp32 = multiply_fp8(x_TC, weight)
            return in_fp32 if wide else in_fp32.to(x_TC.dtype)
        return matmul_fp32(x_TC, weight) if wide else F.linear(x_TC, weight)

    def add_and_norm(
        self, x_TD: Tensor, added_TD: Product | None, bias_D: Tensor | None, norm: Norm
    ) -> Tensor:
        if added_TD is not None and bias_D is not None:
            assert isinstance(added_TD, Tensor), "these operations apply scales at once"
            x_TD += added_TD
            x_TD += bias_D
        normed = F.layer_norm(x_TD, x_TD.shape[-1:], norm.weight_D, norm.bias_D, self._epsilon)
        return normed.to(self._dtype)

    def rope_and_cache(
        self,
        qkv_fc_in: Product,
        bias_I: Tensor,
        rotary: tuple[Tensor, Tensor],
        inputs: Inputs,
        cache: LayerCache,
        attn_mlp: Tensor,
    ) -> Tensor:
        assert isinstance(qkv_fc_in, Tensor), "these operations apply scales at once"
        heads, page_size, head_dim = cache.keys.shape[1:]
        width = heads * head_dim
        q, k, v = (
            qkv_fc_in[:, start : start + width].reshape(-1, heads, head_dim)
            for start in range(0, 3 * width, width)
        )
        turns = [
            table[inputs.positions_T].repeat_interleave(2, dim=-1)[None, :, None]
            for table in rotary
        ]
        turning = Rotary(*turns)
        q_THK, k_THK = turning.rotate(q[None])[0], turning.rotate(k[None])[0]
        pages_T, places_T = inputs.slots_T // page_size, inputs.slots_T % page_size
        store(cache.keys, cache.key_scales, pages_T, places_T, k_THK)
        store(cache.values, cache.value_scales, pages_T, places_T, v)
        attn_mlp[:, width:] = F.gelu(qkv_fc_in[:, 3 * width :].float() + bias_I, approximate="tanh")
        return q_THK

    def paged_attention(
        self, q_THK: Tensor, inputs: Inputs, cache: LayerCache, attn_mlp: Tensor
    ) -> None:
        num_decodes = inputs.num_decodes
        joined_THK = attn_mlp[:, : q_THK[0].numel()].view(q_THK.shape)
        if num_decodes:
            joined_THK[:num_decodes] = _decode_attention(
                q_THK[:num_decodes],
                inputs.page_table_RP[:num_decodes],
                inputs.positions_T[:num_decodes],
                cache,
            )
        page_size = cache.keys.shape[2]
        for chunk in inputs.chunks:
            tokens = slice(chunk.start, chunk.start + chunk.tokens)
            length = chunk.position + chunk.tokens
            pages = inputs.page_table_RP[chunk.row, : -(-length // page_size)]
            keys, values = (
                stored(*pair, pages, q_THK.dtype).transpose(0, 1).flatten(1, 2)[:, :length]
                for pair in pairs(cache)
            )
            places = torch.arange(length, device=q_THK.device)
            # PyTorch has fused kernels for four dimensions only.
            attended = F.scaled_dot_product_attention(
                q_THK[tokens].transpose(0, 1)[None],
                keys[None],
                values[None],
                attn_mask=(places <= inputs.positions_T[tokens, None])[None, None],
            )
            joined_THK[tokens] = attended[0].transpose(0, 1)

    def add_lora(self, y_TO: Product, x_TI: Tensor, adapted: Adapted, inputs: Inputs) -> Tensor:
        assert isinstance(y_TO, Tensor), "these operations apply scales at once"
        assert inputs.adapters_T is not None
        for token, slot in enumerate(inputs.adapters_T.tolist()):
            if slot != NONE:
                adapted.add(y_TO[token : token + 1], x_TI[token : token + 1], slot)
        return y_TO

    def copy_pages(self, cache: Cache, copies: Sequence[PageCopy]) -> None:
        parts = [part for part in (cache.data, cache.scales) if part is not None]
        for part, (source, target, filled) in product(parts, copies):
            part[:, :, target, :, :filled] = part[:, :, source, :, :filled]


def store(
    cached: Tensor, scales: Tensor | None, pages_T: Tensor, places_T: Tensor, x_THK: Tensor
) -> None:
    """Put tokens' keys or values in their places; in fp8 with scales."""
    if scales is None:
        cached[pages_T, :, places_T] = x_THK
        return
    numbers_THK, scales[pages_T, :, places_T] = quantized_rows(x_THK.float())
    # PyTorch does not index numbers in fp8.
    cached.view(torch.uint8)[pages_T, :, places_T] = numbers_THK.view(torch.uint8)


def pairs(cache: LayerCache) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """Keys and values with their scales."""
    return (cache.keys, cache.key_scales), (cache.values, cache.value_scales)


def stored(numbers: Tensor, scales: Tensor | None, pages: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values of pages (pages, H, page size, K)."""
    if scales is None:
        return numbers[pages]
    wide = numbers.view(torch.uint8)[pages].view(FP8).float()
    return (wide * scales[pages][..., None]).to(dtype)


def _decode_attention(
    q_RHK: Tensor, page_table_RP: Tensor, positions_R: Tensor, cache: LayerCache
) -> Tensor:
    """One token of each sequence, with shapes that do not depend on lengths."""
    places = torch.arange(page_table_RP.shape[1] * cache.keys.shape[2], device=q_RHK.device)
    visible_RS = places <= positions_R[:, None]
    # Memory beyond a context may hold anything, and NaN times 0 is NaN.
    keys, values = (
        torch.where(
            visible_RS[:, None, :, None],
            stored(*pair, page_table_RP, q_RHK.dtype).transpose(1, 2).flatten(2, 3),
            0,
        )
        for pair in pairs(cache)
    )
    attended = F.scaled_dot_product_attention(
        q_RHK[:, :, None], keys, values, attn_mask=visible_RS[:, None, None]
    )
    return attended[:, :, 0]
