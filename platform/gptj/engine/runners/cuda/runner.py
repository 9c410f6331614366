"""A Runner for GPUs: CUDA graphs for decode steps, including drafts; eager kernels for prefill.

Shape suffixes: T tokens of a step, R sequences, W rows of logits, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptj.engine.runners.base import PAGE_SIZE, PageCopy, StepBatch, independent_groups
from gptj.engine.runners.cuda.fp8 import Product
from gptj.engine.runners.cuda.graphs import MAX_SIZE, Graphs, size_for
from gptj.engine.runners.cuda.inputs import InputsMaker, with_drafts_as_rows
from gptj.engine.runners.cuda.lora import LoRASlots
from gptj.engine.runners.cuda.operations import Cache, Inputs, LayerCache, Operations
from gptj.engine.runners.cuda.weights import Format, take
from gptj.engine.runners.fp32_matmul import fp32_reduction
from gptj.engine.runners.lora import LoRALimits, LoRAWeights
from gptj.model import GPTJForCausalLM


class CudaRunner:
    """The model's weights, fused into two matrices per layer, and a paged KV cache.

    Weights and cache have the model's dtype, the cache optionally fp8; the residual stream and its
    addends, norms, softmax and logits are fp32. On a CPU, in tests, there are no graphs.

    Quantized weights are made from the model's, on its device and layer by layer. Activations keep
    the model's dtype, except the inputs of products in fp8.

    Args:
        model: in evaluation mode, on its device.
        num_pages: of the cache; one page is added for padding.
        operations: for the model's device and dtype.
        quantization: of the layers' weights: int8 with a scale per output, or int4 in groups (see
            gptj.layers.int4), with the head in int8; a model's own 4-bit weights keep their values.
            Or fp8 (see `fp8`), with the head as it is.
        cache_dtype: torch.float8_e4m3fn, or None: the model's.
        lora: limits of the adapters to support.
        release: move the weights out of the model while fusing them, keeping one copy in memory;
            the model is unusable afterwards.
    """

    page_size = PAGE_SIZE

    def __init__(
        self,
        model: GPTJForCausalLM,
        num_pages: int,
        operations: Operations,
        *,
        quantization: Format | None = None,
        cache_dtype: torch.dtype | None = None,
        lora: LoRALimits | None = None,
        release: bool = False,
    ) -> None:
        self.config = config = model.config
        self.device = model.device
        self._operations = operations
        self._dtype = model.dtype
        self.cache_dtype = cache_dtype or model.dtype
        self._on_gpu = self.asynchronous = self.device.type == "cuda"
        self.draw = operations.draw
        self._weights = take(model, release=release, quantization=quantization)
        self.bytes_read = self._weights.bytes_read  # bytes of weights per step
        self._lora = None
        if lora is not None:
            self._lora = LoRASlots(config, lora, self._dtype, self.device)
        self._logits = torch.zeros(MAX_SIZE, config.vocab_size, device=self.device)
        if self._on_gpu:
            with torch.inference_mode(), self._computing():
                self._stream = torch.cuda.Stream(self.device)
                self._stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self._stream):
                    operations.prepare(self._weights)
                torch.cuda.current_stream().wait_stream(self._stream)
        self.resize(num_pages)

    def resize(self, num_pages: int) -> None:
        """Replace the cache by an empty one of `num_pages` pages, and recapture the graphs.

        Graphs hold the cache's address. Their own memory does not depend on its size, so it can be
        measured with a small cache before sizing the real one.
        """
        config = self.config
        self.num_pages = num_pages
        self._graphs: Graphs | None = None
        self._lora_graphs: Graphs | None = None  # of steps with adapters
        self._layer_caches: list[LayerCache] = []
        self._cache = self._new_cache(0)  # free the old one first
        if self._on_gpu:
            torch.cuda.empty_cache()
        self._cache = self._new_cache(num_pages + 1)
        self._layer_caches = self._cache.layers()
        max_pages = -(-config.n_positions // PAGE_SIZE)
        self._inputs = InputsMaker(
            self.device, max_pages, PAGE_SIZE, num_pages, MAX_SIZE, self._operations.tile
        )
        if self._on_gpu:
            with torch.inference_mode(), self._computing():
                # Capturing writes to page 0, which is still unused.
                self._graphs = Graphs(self._compute_decode, self._stream)
                if self._lora is not None:
                    step = partial(self._compute_decode, lora=self._lora)
                    self._lora_graphs = Graphs(step, self._stream)

    def _new_cache(self, pages: int) -> Cache:
        layers = self.config.n_layer
        return Cache.zeros(self.config, layers, pages, self.cache_dtype, self.device)

    @torch.inference_mode()
    def step(self, batch: StepBatch) -> Tensor:
        batch.check(self.config, self.page_size, self.num_pages)
        batch = with_drafts_as_rows(batch)
        count = len(batch.ids_T)
        single = count == len(batch.query_start_loc) - 1 and np.array_equal(
            batch.logits_indices, np.arange(count)
        )
        with self._computing():
            if single and count <= MAX_SIZE:
                return self._step_decode(batch)
            inputs = self._inputs.of(batch)
            hidden_TD = self._hidden(inputs, self._adapters_of(batch))
            logits_WV = self._head(hidden_TD[inputs.logits_indices_W])
            logits_WV += self._weights.head_bias_V
            return logits_WV

    @torch.inference_mode()
    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        with self._computing():
            for run in independent_groups(copies):
                self._operations.copy_pages(self._cache, run)

    def load_adapter(self, slot: int, weights: LoRAWeights) -> None:
        assert self._lora is not None, "the runner has no room for adapters"
        # Not `_computing`: another thread computes. Both use the device's default stream.
        with torch.inference_mode(), self._on_device():
            self._lora.put(slot, weights)

    def reset(self) -> None:
        self._cache.zero_()

    def close(self) -> None:
        self._graphs = self._lora_graphs = self._lora = None
        del self._weights, self._cache, self._layer_caches, self._logits, self._inputs
        del self._operations, self.draw

    def _step_decode(self, batch: StepBatch) -> Tensor:
        count = len(batch.ids_T)
        size = size_for(count)
        self._inputs.fill(batch, size)
        lora = self._adapters_of(batch)
        graphs = self._graphs if lora is None else self._lora_graphs
        if graphs is not None:
            graphs.replay(size)
        else:
            self._compute_decode(size, lora)
        # A new tensor: the next step overwrites _logits.
        return self._logits[:count] + self._weights.head_bias_V

    def _adapters_of(self, batch: StepBatch) -> LoRASlots | None:
        """None if no sequence has an adapter."""
        return None if batch.adapters_R is None else self._lora

    def _compute_decode(self, size: int, lora: LoRASlots | None = None) -> None:
        """Compute a decode step on static tensors."""
        self._logits[:size] = self._head(self._hidden(self._inputs.static(size), lora))

    def _hidden(self, inputs: Inputs, lora: LoRASlots | None) -> Tensor:
        """Compute final hidden states (T, D), caching keys and values."""
        operations, weights = self._operations, self._weights
        x_TD = F.embedding(inputs.ids_T, weights.embedding_VD).float()
        added_TD: Product | None = None
        bias_D: Tensor | None = None
        layers = zip(weights.layers, self._layer_caches, strict=True)
        for number, (layer, cache) in enumerate(layers):
            h_TD = operations.add_and_norm(x_TD, added_TD, bias_D, layer.norm)
            attn_mlp = h_TD.new_empty(len(h_TD), layer.out_proj_fc_out.shape[1])
            qkv_fc_in = operations.multiply(h_TD, layer.qkv_fc_in)
            if lora is not None:
                adapted = lora.layers[number].qkv_fc_in
                qkv_fc_in = operations.add_lora(qkv_fc_in, h_TD, adapted, inputs)
            q_THK = operations.rope_and_cache(
                qkv_fc_in,
                layer.fc_in_bias_I,
                (weights.sines, weights.cosines),
                inputs,
                cache,
                attn_mlp,
            )
            operations.paged_attention(q_THK, inputs, cache, attn_mlp)
            added_TD = operations.multiply(attn_mlp, layer.out_proj_fc_out, wide=True)
            if lora is not None:
                adapted = lora.layers[number].out_proj_fc_out
                added_TD = operations.add_lora(added_TD, attn_mlp, adapted, inputs)
            bias_D = layer.fc_out_bias_D
        return operations.add_and_norm(x_TD, added_TD, bias_D, weights.norm)

    def _head(self, h_WD: Tensor) -> Tensor:
        """Logits in fp32, before the bias."""
        logits_WV = self._operations.multiply(h_WD, self._weights.head_VD, wide=True)
        assert isinstance(logits_WV, Tensor), "the head is not in fp8"
        return logits_WV

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Make the device current: Triton launches kernels there."""
        with self._on_device(), fp32_reduction():
            yield

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self._on_gpu else nullcontext()
