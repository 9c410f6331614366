"""A step's operations with Triton kernels: their block sizes and grids."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
from torch import Tensor

from gptj.config import GPTJConfig
from gptj.engine.runners.base import PAGE_SIZE, Draw, PageCopy
from gptj.engine.runners.cuda import kernels
from gptj.engine.runners.cuda.fp8 import (
    ALIGNMENT,
    Fp8Matrix,
    Product,
    UnscaledProduct,
    parts_of,
    quantize,
)
from gptj.engine.runners.cuda.fp8_linear import Fp8Linear, apply_scales
from gptj.engine.runners.cuda.graphs import MAX_SIZE, SIZES
from gptj.engine.runners.cuda.inputs import InputsMaker
from gptj.engine.runners.cuda.lora import Adapted, AdaptedLayer, Ranks
from gptj.engine.runners.cuda.operations import MAX_GROUP, Cache, Inputs, LayerCache
from gptj.engine.runners.cuda.quantized_linear import QuantizedLinear
from gptj.engine.runners.cuda.quantized_matrix import QuantizedMatrix, pack
from gptj.engine.runners.cuda.sampling import draw
from gptj.engine.runners.cuda.tuned_linear import TunedLinear
from gptj.engine.runners.cuda.weights import BITS, HEAD_BITS, Format, Matrix, Norm, Weights
from gptj.engine.runners.lora import NONE, LoRALimits
from gptj.engine.runners.transfer import to_device

BLOCK_INNER = 1024
MAX_SPLITS = 32
LORA_BLOCK_RANK, LORA_BLOCK_INPUTS = 8, 512
LORA_BLOCK_COLUMNS, LORA_BLOCK_TERMS = 128, 16
PROGRAMS = 4  # of decode attention per multiprocessor: as many as are resident on an H100 in fp16


@dataclass(frozen=True)
class AttentionBlocks:
    """Block sizes of an attention kernel."""

    tokens: int  # whose queries a program attends with: tensor cores need 16
    places: int  # of their context, per iteration
    stages: int  # of Triton's software pipeline: page numbers take as many as keys and values
    warps: int


# By the cache's bytes per number. Of ten choices for fp16 on an H100, several read within 2 % of
# each other; of six for fp8 this is the fastest by 14 %.
DECODE_BLOCKS = {
    1: AttentionBlocks(MAX_GROUP, 16, 5, 1),
    2: AttentionBlocks(MAX_GROUP, 16, 5, 2),
    4: AttentionBlocks(MAX_GROUP, 16, 3, 4),
}
# Likewise, for heads up to a width, and by the shared memory that a program may have, in bytes.
# Hopper's matrix instructions need 64 tokens.
PREFILL_BLOCKS = (
    (2, 256, 220_000, AttentionBlocks(128, 64, 2, 8)),
    (2, sys.maxsize, 0, AttentionBlocks(32, 32, 2, 4)),
    (4, sys.maxsize, 0, AttentionBlocks(32, 16, 2, 8)),
)
# Of a cache in fp8, whose conversion takes registers: with more places or fewer stages they spill.
FP8_PREFILL_PLACES, FP8_PREFILL_STAGES = 32, 3
MIN_SHARED_MEMORY = 101_376  # of the GPUs that the kernels support


class TritonOperations:
    """See Operations.

    Args:
        dtype: of the matrix products' inputs.
        processors: the GPU's number of multiprocessors.
        shared_memory: bytes of it that a program may have.
    """

    def __init__(
        self,
        config: GPTJConfig,
        dtype: torch.dtype,
        processors: int,
        shared_memory: int = MIN_SHARED_MEMORY,
    ) -> None:
        self._config = config
        self._prefill_blocks = next(
            blocks
            for bytes_each, width, least, blocks in PREFILL_BLOCKS
            if bytes_each == dtype.itemsize and config.head_dim <= width and least <= shared_memory
        )
        self.tile = self._prefill_blocks.tokens
        self.draw: Draw | None = draw
        self._dtype = dtype
        self._processors = processors
        self._tuned_linear = TunedLinear()
        self._quantized_linear = QuantizedLinear(processors)
        self._fp8_linear = Fp8Linear()
        self._row = config.n_embd + config.inner_dim
        self._block_width = triton.next_power_of_2(config.n_embd)
        # Tensor cores need at least 16 terms.
        self._block_dim = max(16, triton.next_power_of_2(config.head_dim))
        self._scale = math.log2(math.e) / math.sqrt(config.head_dim)  # the kernels use exp2

    @classmethod
    def on(cls, device: torch.device, config: GPTJConfig, dtype: torch.dtype) -> TritonOperations:
        """The operations for a GPU, by its properties."""
        properties = torch.cuda.get_device_properties(device)
        shared_memory = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        return cls(config, dtype, properties.multi_processor_count, shared_memory)

    def try_out(
        self,
        device: torch.device,
        lora: LoRALimits | None = None,
        quantization: Format | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        """Launch all kernels as a step would, on a cache of two pages.

        Except those for products that read all weights, since `prepare` skips failing candidates.
        """
        config = self._config
        width, inner = config.n_embd, config.inner_dim

        def zeros(*shape: int, dtype: torch.dtype = self._dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        cache = Cache.zeros(config, 1, 2, cache_dtype or self._dtype, device)
        (layer,) = cache.layers()
        vector, inner_bias = zeros(width, dtype=torch.float32), zeros(inner, dtype=torch.float32)
        norm = Norm(vector, vector)
        table = zeros(config.n_positions, config.rotated_dim // 2, dtype=torch.float32)
        max_pages = -(-config.n_positions // PAGE_SIZE)
        maker = InputsMaker(device, max_pages, PAGE_SIZE, 1, MAX_SIZE, self.tile)
        # The smallest decode batch of each number of splits, and a prefill chunk.
        sizes = {self.splits(size): size for size in reversed(SIZES)}.values()
        tile = torch.tensor([[0, 0, 1, 0]], dtype=torch.int32, device=device)
        chunk = replace(maker.static(1), num_decodes=0, tiles_N4=tile)
        for inputs in (*map(maker.static, sizes), chunk):
            tokens = len(inputs.ids_T)
            x_TD, added_TD = (zeros(tokens, width, dtype=torch.float32) for _ in range(2))
            attn_mlp = zeros(tokens, width + inner)
            self.add_and_norm(x_TD, None, None, norm)
            qkv_fc_in: Product = zeros(tokens, 3 * width + inner)
            more_TD: Product = added_TD
            if quantization == "fp8":
                rows = zeros(tokens, dtype=torch.float32)
                more_TD = UnscaledProduct(added_TD, rows, vector)
                columns = zeros(3 * width + inner, dtype=torch.float32)
                qkv_fc_in = UnscaledProduct(zeros(tokens, 3 * width + inner), rows, columns)
            self.add_and_norm(x_TD, more_TD, vector, norm)
            q_THK = self.rope_and_cache(
                qkv_fc_in, inner_bias, (table, table), inputs, layer, attn_mlp
            )
            self.paged_attention(q_THK, inputs, layer, attn_mlp)
        if lora is not None:
            ranks = Ranks.empty(lora, device)
            adapted = AdaptedLayer.empty(config, lora, self._dtype, ranks)
            inputs = maker.static(1)
            assert inputs.adapters_T is not None
            self.add_lora(zeros(1, 3 * width + inner), zeros(1, width), adapted.qkv_fc_in, inputs)
            added_TD = zeros(1, width, dtype=torch.float32)
            self.add_lora(added_TD, zeros(1, width + inner), adapted.out_proj_fc_out, inputs)
        for inputs_C in (width, width + inner):
            if quantization == "fp8":
                weight = quantize([zeros(ALIGNMENT, inputs_C)])
                for wide in (False, True):
                    apply_scales(self.multiply(zeros(1, inputs_C), weight, wide=wide))
            elif quantization is not None:
                for bits in {BITS[quantization], HEAD_BITS}:
                    self.multiply(zeros(1, inputs_C), pack([zeros(1, inputs_C)], bits))
        self.copy_pages(cache, [PageCopy(0, 1, PAGE_SIZE)])
        row, one = zeros(1, dtype=torch.int64), zeros(1, dtype=torch.float32) + 1
        logits = zeros(1, config.vocab_size, dtype=torch.float32)
        draw(logits, row, one, row.int(), one, one, one.double())

    def prepare(self, weights: Weights) -> None:
        products = (
            ([weights.head_VD], True),  # first: it is the largest
            ([layer.qkv_fc_in for layer in weights.layers], False),
            ([layer.out_proj_fc_out for layer in weights.layers], True),
        )
        for matrices, wide in products:
            if packed := [each for each in matrices if isinstance(each, QuantizedMatrix)]:
                self._quantized_linear.tune(packed, self._dtype, wide=wide)
            if in_fp8 := [each for each in matrices if isinstance(each, Fp8Matrix)]:
                self._fp8_linear.tune(in_fp8, self._dtype, wide=wide)
            if plain := [each for each in matrices if isinstance(each, Tensor)]:
                self._tuned_linear.tune(plain, wide=wide)

    def multiply(self, x_TC: Tensor, weight: Matrix, *, wide: bool = False) -> Product:
        if isinstance(weight, QuantizedMatrix):
            return self._quantized_linear.multiply(x_TC, weight, wide=wide)
        if isinstance(weight, Fp8Matrix):
            return self._fp8_linear.multiply(x_TC, weight, wide=wide)
        return self._tuned_linear.multiply(x_TC, weight, wide=wide)

    def add_and_norm(
        self, x_TD: Tensor, added_TD: Product | None, bias_D: Tensor | None, norm: Norm
    ) -> Tensor:
        normed_TD = torch.empty(x_TD.shape, dtype=self._dtype, device=x_TD.device)
        kernels.add_and_norm[(len(x_TD),)](
            x_TD,
            *parts_of(x_TD if added_TD is None else added_TD),
            norm.bias_D if bias_D is None else bias_D,
            norm.weight_D,
            norm.bias_D,
            normed_TD,
            self._config.layer_norm_epsilon,
            ADDS=added_TD is not None,
            WIDTH=self._config.n_embd,
            BLOCK_WIDTH=self._block_width,
            num_warps=8,
        )
        return normed_TD

    def rope_and_cache(
        self,
        qkv_fc_in: Product,
        bias_I: Tensor,
        rotary: tuple[Tensor, Tensor],
        inputs: Inputs,
        cache: LayerCache,
        attn_mlp: Tensor,
    ) -> Tensor:
        config = self._config
        shape = (len(attn_mlp), config.n_head, config.head_dim)
        q_THK = torch.empty(shape, dtype=self._dtype, device=attn_mlp.device)
        programs = config.n_head + triton.cdiv(config.inner_dim, BLOCK_INNER)
        kernels.rope_and_cache[(len(attn_mlp), programs)](
            *parts_of(qkv_fc_in),
            bias_I,
            *rotary,
            inputs.positions_T,
            inputs.slots_T,
            q_THK,
            cache.keys,
            cache.values,
            cache.key_scales,
            cache.value_scales,
            attn_mlp,
            HEADS=config.n_head,
            HEAD_DIM=config.head_dim,
            BLOCK_DIM=self._block_dim,
            ROTATED=config.rotated_dim,
            PAGE_SIZE=cache.keys.shape[2],
            INNER=config.inner_dim,
            BLOCK_INNER=BLOCK_INNER,
        )
        return q_THK

    def paged_attention(
        self, q_THK: Tensor, inputs: Inputs, cache: LayerCache, attn_mlp: Tensor
    ) -> None:
        if inputs.num_decodes:
            self._decode_attention(q_THK, inputs, cache, attn_mlp)
        if inputs.tiles_N4 is not None:
            self._prefill_attention(q_THK, inputs, inputs.tiles_N4, cache, attn_mlp)

    def add_lora(self, y_TO: Product, x_TI: Tensor, adapted: Adapted, inputs: Inputs) -> Tensor:
        y_TO = apply_scales(y_TO)
        if inputs.num_decodes:
            self._add_lora(y_TO, x_TI, adapted, inputs)
        for chunk in inputs.chunks:
            if chunk.adapter != NONE:
                tokens = slice(chunk.start, chunk.start + chunk.tokens)
                adapted.add(y_TO[tokens], x_TI[tokens], chunk.adapter)
        return y_TO

    def _add_lora(self, y_TO: Tensor, x_TI: Tensor, adapted: Adapted, inputs: Inputs) -> None:
        """For decode rows, each of which may have a different adapter."""
        rank, modules, tokens = adapted.rank, len(adapted.inputs), inputs.num_decodes
        ranks_S = adapted.ranks.on_device_S
        small = torch.empty(tokens, modules * rank, dtype=torch.float32, device=x_TI.device)
        block_rank = min(rank, LORA_BLOCK_RANK)
        kernels.lora_shrink[(tokens, modules * rank // block_rank)](
            x_TI,
            adapted.a,
            inputs.adapters_T,
            ranks_S,
            small,
            ROW=x_TI.shape[1],
            SLOT=adapted.a.shape[1],
            RANK=rank,
            MODULES=modules,
            FIRST=adapted.inputs[0],
            SECOND=adapted.inputs[-1],
            BESIDE=adapted.beside,
            BLOCK_RANK=block_rank,
            BLOCK_INPUTS=min(LORA_BLOCK_INPUTS, triton.next_power_of_2(adapted.inputs[0])),
        )
        columns, terms = adapted.b.shape[1:]
        block_terms = min(terms, LORA_BLOCK_TERMS)
        kernels.lora_expand[(tokens, triton.cdiv(columns, LORA_BLOCK_COLUMNS))](
            small,
            adapted.b,
            inputs.adapters_T,
            ranks_S,
            y_TO,
            COLUMNS=columns,
            RANK=rank,
            TERMS=terms,
            MODULES=modules,
            WIDTH=adapted.columns[0],
            BLOCK_COLUMNS=LORA_BLOCK_COLUMNS,
            BLOCK_TERMS=block_terms,
        )

    def copy_pages(self, cache: Cache, copies: Sequence[PageCopy]) -> None:
        parts, layers, pages, heads, page_size, head_dim = cache.data.shape
        kernels.copy_pages[(len(copies), parts * layers, heads)](
            cache.data,
            cache.scales,
            to_device(np.array(copies, np.int32), cache.data.device),
            pages,
            HEADS=heads,
            HEAD_DIM=head_dim,
            PAGE_SIZE=page_size,
            BLOCK=triton.next_power_of_2(page_size * head_dim),
        )

    def splits(self, num_decodes: int) -> int:
        """Number of splits of each context in decode attention, to occupy all multiprocessors.

        Depends only on the batch size, since a graph's grid cannot depend on lengths.
        """
        programs = num_decodes * self._config.n_head
        splits: int = triton.next_power_of_2(triton.cdiv(PROGRAMS * self._processors, programs))
        return min(splits, MAX_SPLITS)

    def _decode_attention(
        self, q_THK: Tensor, inputs: Inputs, cache: LayerCache, attn_mlp: Tensor
    ) -> None:
        config, num_decodes = self._config, inputs.num_decodes
        blocks, splits = DECODE_BLOCKS[cache.keys.dtype.itemsize], self.splits(num_decodes)
        # Of groups, each token's own part is one more split.
        shape = (num_decodes, config.n_head, splits + 1)
        sums = torch.empty(*shape, config.head_dim, dtype=torch.float32, device=q_THK.device)
        scales = torch.empty(*shape, 2, dtype=torch.float32, device=q_THK.device)
        kernels.paged_decode_attention[(num_decodes, config.n_head, splits + 1)](
            q_THK,
            cache.keys,
            cache.values,
            cache.key_scales,
            cache.value_scales,
            inputs.page_table_RP,
            inputs.positions_T,
            inputs.groups_R2,
            attn_mlp,
            sums,
            scales,
            self._scale,
            HEADS=config.n_head,
            HEAD_DIM=config.head_dim,
            BLOCK_DIM=self._block_dim,
            PAGE_SIZE=cache.keys.shape[2],
            PAGES=inputs.page_table_RP.shape[1],
            ROW=self._row,
            SPLITS=splits,
            LINES=blocks.tokens,
            BLOCK_PLACES=blocks.places,
            STAGES=blocks.stages,
            num_warps=blocks.warps,
        )
        kernels.merge_splits[(num_decodes, config.n_head)](
            sums,
            scales,
            inputs.groups_R2,
            attn_mlp,
            HEADS=config.n_head,
            HEAD_DIM=config.head_dim,
            BLOCK_DIM=self._block_dim,
            ROW=self._row,
            SPLITS=splits,
            BLOCK_SPLITS=triton.next_power_of_2(splits + 1),
        )

    def _prefill_attention(
        self, q_THK: Tensor, inputs: Inputs, tiles_N4: Tensor, cache: LayerCache, attn_mlp: Tensor
    ) -> None:
        config, blocks = self._config, self._prefill_blocks
        if cache.key_scales is not None:
            places = min(blocks.places, FP8_PREFILL_PLACES)
            blocks = replace(blocks, places=places, stages=FP8_PREFILL_STAGES)
        kernels.paged_prefill_attention[(config.n_head, len(tiles_N4))](
            q_THK,
            cache.keys,
            cache.values,
            cache.key_scales,
            cache.value_scales,
            inputs.page_table_RP,
            tiles_N4,
            attn_mlp,
            self._scale,
            HEADS=config.n_head,
            HEAD_DIM=config.head_dim,
            BLOCK_DIM=self._block_dim,
            PAGE_SIZE=cache.keys.shape[2],
            PAGES=inputs.page_table_RP.shape[1],
            ROW=self._row,
            TILE=blocks.tokens,
            BLOCK_PLACES=blocks.places,
            STAGES=blocks.stages,
            num_warps=blocks.warps,
        )
