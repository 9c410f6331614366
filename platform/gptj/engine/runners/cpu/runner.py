"""A Runner that uses step.cpp's kernels, for CPUs with AVX-512 or AVX2.

Weights are fp32, bf16, int8 or int4.

One call computes a step, without the GIL and without padding. Results are bitwise independent of
the batch's other rows.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gptj.engine.runners.base import Draw, PageCopy, StepBatch
from gptj.engine.runners.cpu import library
from gptj.engine.runners.cpu.adapters import LANES, PackedAdapter, pack_adapter
from gptj.engine.runners.cpu.packing import KINDS, Kind, PackedLinear, check_int4_widths, pack
from gptj.engine.runners.lora import NONE, LoRALimits, LoRAWeights
from gptj.layers.int4 import Int4Linear, is_int4
from gptj.model import GPTJBlock, GPTJForCausalLM, GPTJModel, Rotary

MIN_BYTES = 2**21  # smallest allocation that gets huge pages


class CpuRunner:
    """The model's weights in the kernels' layout, and a paged KV cache.

    The embedding and the cache are fp32 for fp32 weights and bf16 otherwise; the residual stream,
    norms, softmax and logits are always fp32.

    Args:
        model: in evaluation mode, on the CPU. Of a GPTJModel, which has no head, a step returns
            the final hidden states (W, D) instead of logits.
        num_pages: of the cache.
        kind: of the weights; int8 is symmetric with a scale per output, and also quantizes
            activations, with a scale per 128 inputs. int4 (see gptj.layers.int4) quantizes
            activations to 8 bits with a scale per group of 64 inputs, and the head's weights in
            int8.
        threads: including the caller's; default: PyTorch's setting.
        lora: whether there can be adapters, whose matrices are fp32 and not quantized.
        release: move the weights out of the model piece by piece, keeping one copy in memory; the
            model, and anything that shares its memory, is unusable afterwards.

    Raises:
        UnsupportedError: if the processor or the model's configuration is not supported.
    """

    page_size = 16
    asynchronous = False
    draw: Draw | None = None

    def __init__(
        self,
        model: GPTJForCausalLM | GPTJModel,
        num_pages: int,
        kind: Kind,
        *,
        threads: int | None = None,
        lora: LoRALimits | None = None,
        release: bool = False,
    ) -> None:
        self._library = library.load()
        self.config = config = model.config
        self.device = torch.device("cpu")
        self.num_pages = num_pages
        self._kind: Kind = kind
        self._columns = config.vocab_size if isinstance(model, GPTJForCausalLM) else config.n_embd
        _check(model, kind, lora)
        self._adapters: dict[int, PackedAdapter] = {}  # by slot
        self._kept: list[Tensor] = []  # tensors the kernels hold pointers to
        self._bytes_read = 0
        self._threads = threads or torch.get_num_threads()
        with torch.inference_mode():
            self._model = self._packed(model, release)
        shape = (config.n_layer, num_pages, config.n_head, self.page_size * config.head_dim)
        cache_type = torch.float32 if kind == "fp32" else torch.bfloat16
        size = 2 * math.prod(shape) * cache_type.itemsize
        self._cache = self._allocate(size).view(cache_type).view(2, *shape).zero_()
        self._model.keys = self._cache[0].data_ptr()
        self._model.values = self._cache[1].data_ptr()
        sizes = library.Sizes(
            KINDS.index("fp32" if kind == "fp32" else "bf16"),
            config.n_layer,
            config.n_embd,
            config.n_head,
            config.head_dim,
            config.rotated_dim,
            config.inner_dim,
            config.vocab_size,
            num_pages,
            self._threads,
            config.layer_norm_epsilon,
        )
        self._handle = self._library.gptj_create(ctypes.byref(sizes), ctypes.byref(self._model))
        if not self._handle:
            raise MemoryError("no memory or threads for the kernels")

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that a step reads: all except the embedding."""
        return self._bytes_read

    def step(self, batch: StepBatch) -> Tensor:
        assert self._handle is not None, "closed"
        batch.check(self.config, self.page_size, self.num_pages)
        num_logits = len(batch.logits_indices)
        logits = torch.empty(num_logits, self._columns)
        adapters = None if batch.adapters_R is None else self._adapters_of(batch)
        step = library.Step(
            batch.ids_T.ctypes.data,
            batch.positions_T.ctypes.data,
            batch.query_start_loc.ctypes.data,
            batch.page_table_RP.ctypes.data,
            batch.logits_indices.ctypes.data,
            len(batch.ids_T),
            len(batch.query_start_loc) - 1,
            batch.page_table_RP.shape[1],
            num_logits,
            logits.data_ptr(),
            None if adapters is None else adapters.ctypes.data,
        )
        if self._library.gptj_step(self._handle, ctypes.byref(step)) != 0:
            raise MemoryError(f"no memory for a step of {len(batch.ids_T)} tokens")
        return logits

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        head, per_word = self.config.head_dim, 4 // self._cache.itemsize
        keys, values = self._cache  # (layers, pages, heads, page_size * head)
        # As step.cpp stores them: keys as (words of the head, positions), values as (words of the
        # positions, head); the last word of values may also hold the position after `filled`.
        keys = keys.view(*keys.shape[:3], head // per_word, self.page_size, per_word)
        values = values.view(*values.shape[:3], self.page_size // per_word, per_word * head)
        for source, target, filled in copies:
            keys[:, target, :, :, :filled] = keys[:, source, :, :, :filled]
            words = -(-filled // per_word)
            values[:, target, :, :words] = values[:, source, :, :words]

    def load_adapter(self, slot: int, weights: LoRAWeights) -> None:
        self._adapters[slot] = pack_adapter(weights)

    def reset(self) -> None:
        self._cache.zero_()

    def close(self) -> None:
        if self._handle is not None:
            self._library.gptj_destroy(self._handle)
            self._handle = None
            self._kept.clear()
            self._adapters.clear()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def _adapters_of(self, batch: StepBatch) -> npt.NDArray[np.uint64]:
        """Each token's adapter's address; 0 without one."""
        slots_T = batch.slots_T
        addresses = np.zeros(len(slots_T), np.uint64)
        for slot in set(slots_T.tolist()) - {NONE}:
            addresses[slots_T == slot] = ctypes.addressof(self._adapters[slot].layers)
        return addresses

    def _packed(self, model: GPTJForCausalLM | GPTJModel, release: bool) -> library.Model:
        """Pack all weights; with `release`, free each once packed."""
        config = self.config
        body = model.transformer if isinstance(model, GPTJForCausalLM) else model
        let_go = _release if release else _keep_as_it_is
        spent = self._discard if release else _keep_rows
        stored = torch.float32 if self._kind == "fp32" else torch.bfloat16
        # The embedding is not packed: it stays mapped from its file if its dtype matches.
        wte = body.wte.weight.detach()
        embedding_VD = wte.to(stored)
        embedding = self._keep(embedding_VD if release else embedding_VD.clone())
        head = library.Weights()
        if isinstance(model, GPTJForCausalLM):
            lm_head = model.lm_head
            tied = wte.data_ptr() == lm_head.weight.data_ptr()
            head_kind: Kind = "int8" if self._kind == "int4" else self._kind
            head = self._linear([lm_head], lm_head.bias, head_kind, _keep_rows if tied else spent)
            let_go(lm_head)
        let_go(body.wte)
        layers = (library.Layer * config.n_layer)()
        for layer, block in zip(layers, body.h, strict=True):
            assert isinstance(block, GPTJBlock)
            attn, mlp = block.attn, block.mlp
            projections = (attn.q_proj, attn.k_proj, attn.v_proj)
            layer.norm_weight, layer.norm_bias = self._norm(block.ln_1)
            layer.qkv = self._linear(projections, None, self._kind, spent)
            let_go(*projections)
            layer.fc_in = self._linear([mlp.fc_in], mlp.fc_in.bias, self._kind, spent)
            let_go(mlp.fc_in)
            last = [attn.out_proj, mlp.fc_out]
            layer.out = self._linear(last, mlp.fc_out.bias, self._kind, spent, beside=True)
            let_go(block)
        final_weight, final_bias = self._norm(body.ln_f)
        let_go(model)
        rotary = Rotary.at(torch.arange(config.n_positions)[None], config)
        signs = torch.tensor([-1.0, 1.0]).repeat(rotary.sin_BL1R.shape[-1] // 2)
        return library.Model(
            embedding,
            final_weight,
            final_bias,
            head,
            self._keep(rotary.sin_BL1R[0, :, 0] * signs),
            self._keep(rotary.cos_BL1R[0, :, 0].contiguous()),
            None,
            None,
            layers,
        )

    def _linear(
        self,
        linears: Sequence[nn.Module],
        bias: Tensor | None,
        kind: Kind,
        spent: Callable[[Tensor], None],
        *,
        beside: bool = False,
    ) -> library.Weights:
        weights: Any = [
            each.int4_weight if isinstance(each, Int4Linear) else each.weight for each in linears
        ]
        packed: PackedLinear = pack(weights, bias, kind, self._allocate, beside=beside, spent=spent)
        self._bytes_read += packed.bytes_read
        scales = None if packed.scales is None else self._keep(packed.scales)
        return library.Weights(
            self._keep(packed.data),
            scales if kind == "int8" else None,
            scales if kind == "int4" else None,
            self._keep(packed.bias),
            KINDS.index(kind),
            packed.columns,
            packed.inputs,
        )

    def _norm(self, norm: nn.LayerNorm) -> tuple[int, int]:
        parts = [self._keep(part.detach().float().clone()) for part in (norm.weight, norm.bias)]
        self._bytes_read += 2 * 4 * self.config.n_embd
        return parts[0], parts[1]

    def _allocate(self, size: int) -> Tensor:
        memory = torch.empty(size, dtype=torch.uint8)
        if size >= MIN_BYTES:
            self._library.gptj_prefer_large_pages(memory.data_ptr(), size)
        return memory

    def _discard(self, rows: Tensor) -> None:
        if rows.is_contiguous():
            self._library.gptj_discard(rows.data_ptr(), rows.nbytes)

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def _check(model: GPTJForCausalLM | GPTJModel, kind: Kind, lora: LoRALimits | None) -> None:
    config = model.config
    if is_int4(model) and kind != "int4":
        raise library.UnsupportedError(f"the model's weights are stored in int4, not in {kind}")
    if kind == "int4":
        check_int4_widths(config)
    if lora is not None and (config.n_embd % LANES or config.inner_dim % LANES):
        raise library.UnsupportedError(
            f"adapters need n_embd={config.n_embd} and n_inner={config.inner_dim} to be multiples "
            f"of {LANES} in the kernels"
        )
    if model.device.type != "cpu":
        raise library.UnsupportedError(f"the model is on {model.device}")
    if config.activation_function != "gelu_new":
        raise library.UnsupportedError(
            f"the kernels support only gelu_new, but the model has {config.activation_function}"
        )
    if config.n_embd % 4 or config.inner_dim % 4 or config.head_dim % 2:
        raise library.UnsupportedError(
            f"the kernels need n_embd={config.n_embd} and n_inner={config.inner_dim} to be "
            f"multiples of 4, and the head width {config.head_dim} to be even"
        )


def _release(*modules: nn.Module) -> None:
    for module in modules:
        for parameter in module.parameters():
            parameter.data = parameter.data.new_empty(0)


def _keep_as_it_is(*modules: nn.Module) -> None:
    """Without `release`."""


def _keep_rows(rows: Tensor) -> None:
    """Do nothing: the rows are still in use."""
