"""A Runner for a GPU: steps of single tokens by recorded graphs, others kernel by kernel.

Shapes, as the ends of names: T tokens of a step, R sequences, W wanted rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptj.engine.cuda.graphs import MAX_SIZE, Graphs, size_for
from gptj.engine.cuda.inputs import InputsMaker
from gptj.engine.cuda.operations import Inputs, LayerCache, Operations
from gptj.engine.cuda.weights import take
from gptj.engine.runner import PAGE_SIZE, StepBatch
from gptj.model import GPTJForCausalLM


class CudaRunner:
    """The model's weights in two matrices a layer, and a cache of pages.

    Weights and cache have the model's dtype; the residual stream, norms, softmax and logits are
    fp32. On a CPU, which tests run it on, there are no graphs.

    Args:
        model: in evaluation mode, on its device.
        num_pages: of the cache; one more is added, for padding.
        operations: for that device and the model's dtype.
        release: take the weights out of the model while they are fused, so that there is one
            copy of them in memory: the model is of no use afterwards.
    """

    page_size = PAGE_SIZE

    def __init__(
        self,
        model: GPTJForCausalLM,
        num_pages: int,
        operations: Operations,
        *,
        release: bool = False,
    ) -> None:
        self.config = config = model.config
        self.device = model.device
        self.num_pages = num_pages
        self._operations = operations
        dtype = model.dtype
        self._weights = take(model, release=release)
        self.bytes_read = self._weights.bytes_read  # of weights, by a step
        shape = (2, config.n_layer, num_pages + 1, config.n_head, PAGE_SIZE, config.head_dim)
        self._cache = torch.zeros(shape, dtype=dtype, device=self.device)
        self._layer_caches = [LayerCache(*each) for each in self._cache.unbind(1)]
        max_pages = -(-config.n_positions // PAGE_SIZE)
        self._inputs = InputsMaker(self.device, max_pages, PAGE_SIZE, num_pages, MAX_SIZE)
        self._logits = torch.zeros(MAX_SIZE, config.vocab_size, dtype=dtype, device=self.device)
        # Kernels are launched on the current device.
        on_gpu = self.device.type == "cuda"
        self._current: AbstractContextManager[Any] = (
            torch.cuda.device(self.device) if on_gpu else nullcontext()
        )
        self._graphs: Graphs | None = None
        if on_gpu:
            with self._current:
                self._prepare()

    @torch.inference_mode()
    def step(self, batch: StepBatch) -> Tensor:
        batch.check(self.config, self.page_size, self.num_pages)
        count = len(batch.ids_T)
        single = count == len(batch.starts) - 1 and np.array_equal(batch.wanted, np.arange(count))
        with self._current:
            if single and count <= MAX_SIZE:
                return self._step_singles(batch)
            inputs = self._inputs.of(batch)
            h_TD = self._hidden(inputs)
            return self._head(h_TD[inputs.wanted_W]) + self._weights.head_bias_V

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        pages = torch.tensor([sources, targets], pin_memory=self.device.type == "cuda")
        taken, given = pages.to(self.device, non_blocking=True)
        self._cache[:, :, given] = self._cache[:, :, taken]

    def reset(self) -> None:
        self._cache.zero_()

    def close(self) -> None:
        self._graphs = None
        del self._weights, self._cache, self._layer_caches, self._logits, self._inputs

    def _step_singles(self, batch: StepBatch) -> Tensor:
        count = len(batch.ids_T)
        size = size_for(count)
        self._inputs.fill(batch, size)
        if self._graphs is not None:
            self._graphs.replay(size)
        else:
            self._compute_singles(size)
        # A sum of its own, in fp32: the next step writes to the same place.
        return self._logits[:count] + self._weights.head_bias_V

    def _compute_singles(self, size: int) -> None:
        """On static tensors alone."""
        self._logits[:size] = self._head(self._hidden(self._inputs.static(size)))

    def _hidden(self, inputs: Inputs) -> Tensor:
        """The states (T, D) from which the head predicts; keys and values go to the cache."""
        operations, weights = self._operations, self._weights
        x_TD = F.embedding(inputs.ids_T, weights.embedding_VD).float()
        added_TD: Tensor | None = None
        bias_D: Tensor | None = None
        for layer, cache in zip(weights.layers, self._layer_caches, strict=True):
            h_TD = operations.add_and_norm(x_TD, added_TD, bias_D, layer.norm)
            joined = h_TD.new_empty(len(h_TD), layer.exit.shape[1])
            q_THK = operations.spread(
                operations.multiply(h_TD, layer.entry),
                layer.entry_bias_I,
                (weights.sines, weights.cosines),
                inputs,
                cache,
                joined,
            )
            operations.attend(q_THK, inputs, cache, joined)
            added_TD, bias_D = operations.multiply(joined, layer.exit), layer.exit_bias_D
        return operations.add_and_norm(x_TD, added_TD, bias_D, weights.norm)

    def _head(self, h_WD: Tensor) -> Tensor:
        """Logits without their bias, in the model's dtype."""
        return self._operations.multiply(h_WD, self._weights.head_VD)

    @torch.inference_mode()
    def _prepare(self) -> None:
        """Measure and compile what any step needs, and record the graphs."""
        self._operations.prepare(self._weights)
        # A single token and a chunk, on the scratch page.
        numbers, starts = np.array([0, 0, 1], np.int32), np.array([0, 1, 3], np.int32)
        pages = np.full((2, 1), self.num_pages, np.int32)
        mixed = StepBatch(numbers, numbers, starts, pages, numbers[1:])
        self._head(self._hidden(self._inputs.of(mixed)))
        # On zeros: page 0, which nobody has yet, is written to.
        self._graphs = Graphs(self._compute_singles, self.device)
