"""A training step's model FLOPs, and the peak FLOP/s of a worker's matrix products.

MFU is their ratio (Chowdhery et al., "PaLM", 2022, appendix B, https://arxiv.org/abs/2204.02311):
recomputed activations and padding do not count.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from gptj.adapters.quantization import QuantizedLinear
from gptj.config import GPTJConfig

GPU_SIZE, CPU_SIZE = 8192, 512  # rows and columns
SECONDS = 0.05


class StepFlops:
    """FLOPs of a model's forward and backward passes.

    Per token, each matrix weight takes 2 in the forward pass, 2 for its input's gradient and, if
    trained, 2 for its own. Attention takes 12 * layers * length * width, as in PaLM, where the
    length is the document's: documents that share a row do not attend to each other.
    """

    def __init__(self, model: nn.Module, config: GPTJConfig) -> None:
        self._attention = 12 * config.n_layer * config.n_embd
        self._weights = 0
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                self._weights += 4 * module.in_features * module.out_features
            if isinstance(module, nn.Linear):
                weight = module.weight
                size = getattr(weight, "ds_numel", weight.numel())
                self._weights += (6 if weight.requires_grad else 4) * size

    def count(self, tokens: int, pairs: int) -> float:
        """FLOPs for `tokens` tokens.

        Args:
            pairs: the sum of the documents' squared lengths.
        """
        return tokens * self._weights + pairs * self._attention


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Best FLOP/s of square matrix products, measured for SECONDS.

    Of random numbers: equal ones take less power, so that a GPU runs faster than real data allow
    (an H100: 885 instead of 732 TFLOP/s). They are not drawn from the global generators.
    """
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    numbers = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(size, size, device=device, dtype=dtype, generator=numbers) for _ in range(2)
    )
    best, began = 0.0, None
    while began is None or time.monotonic() - began < SECONDS:
        started = time.perf_counter()
        product = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
        if began is None:  # the first product may have loaded a library
            best, began = 0.0, time.monotonic()
    del product
    return best
