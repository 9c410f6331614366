"""Which runner a model gets: the fastest that this machine and this model can have."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from gptj.config import GPTJConfig
from gptj.engine.cpu.library import UnsupportedError
from gptj.engine.cpu.packing import Kind
from gptj.engine.cpu.runner import CpuRunner
from gptj.engine.cuda.runner import CudaRunner
from gptj.engine.cuda.support import operations_for
from gptj.engine.runner import PAGE_SIZE, Runner, TorchRunner
from gptj.model import GPTJForCausalLM

logger = logging.getLogger(__name__)

Quantization = Literal["none", "int8"]

KINDS: dict[torch.dtype, Kind] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def best_runner(
    model: GPTJForCausalLM,
    cache_tokens: int,
    *,
    quantization: Quantization = "none",
    release: bool = False,
) -> Runner:
    """Our kernels on a CPU with AVX-512 or a GPU with Triton, and else PyTorch.

    Where it is PyTorch, the log says why.

    Args:
        model: in evaluation mode, on its device.
        cache_tokens: positions that the cache has room for, rounded up to whole pages.
        quantization: int8 keeps weights in 8 bits, whatever the model's dtype.
        release: let the runner take the model's weights, of which there is then one copy.

    Raises:
        UnsupportedError: if int8 is asked for where the kernels cannot run.
        ValueError: if cache_tokens is not positive.
    """
    if cache_tokens < 1:
        raise ValueError(f"cache_tokens must be 1 or more, got {cache_tokens}")
    num_pages = -(-cache_tokens // PAGE_SIZE)
    try:
        if model.device.type == "cpu":
            return CpuRunner(model, num_pages, _kind(model, quantization), release=release)
        if quantization != "none":
            raise UnsupportedError(f"the model is on {model.device}")
        return CudaRunner(model, num_pages, operations_for(model), release=release)
    except UnsupportedError as error:
        if quantization != "none":
            raise UnsupportedError(
                f"quantization={quantization} is not available: {error}"
            ) from error
        logger.warning("generation runs on PyTorch, without our kernels: %s", error)
        return TorchRunner(model, num_pages)


def page_bytes(config: GPTJConfig, element_size: int) -> int:
    """Bytes of a page of the cache: keys and values of PAGE_SIZE positions in all layers."""
    return 2 * config.n_layer * PAGE_SIZE * config.n_embd * element_size


def _kind(model: GPTJForCausalLM, quantization: Quantization) -> Kind:
    kind = "int8" if quantization == "int8" else KINDS.get(model.dtype)
    if kind is None:
        raise UnsupportedError(f"the kernels have no {model.dtype}")
    return kind
