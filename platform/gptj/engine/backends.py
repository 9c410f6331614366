"""Chooses the fastest runner for a model on this machine."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from gptj.engine.cache_size import CacheShare, fit_cache, free_bytes, tokens_within
from gptj.engine.runners.base import PAGE_SIZE, ResizableRunner, Runner, TorchRunner
from gptj.engine.runners.cpu.library import UnsupportedError
from gptj.engine.runners.cpu.packing import Kind
from gptj.engine.runners.cpu.runner import CpuRunner
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.engine.runners.cuda.support import operations_for
from gptj.engine.runners.cuda.weights import Format, freed_by_packing
from gptj.engine.runners.lora import LoRALimits
from gptj.int4 import is_int4
from gptj.model import GPTJForCausalLM
from gptj.pretrained import GPTJPreTrainedModel

logger = logging.getLogger(__name__)

IntQuantization = Literal["none", "int8", "int4"]
Quantization = IntQuantization | Literal["fp8"]

KINDS: dict[torch.dtype, Kind] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def best_runner(
    model: GPTJForCausalLM,
    cache: int | CacheShare,
    *,
    quantization: Quantization = "none",
    lora: LoRALimits | None = None,
    release: bool = False,
) -> Runner:
    """Our kernels on CPUs with AVX2 and GPUs with Triton; otherwise PyTorch, with a warning.

    Args:
        model: in evaluation mode, on its device.
        cache: its size in positions, rounded up to whole pages, or a share of memory.
        quantization: int8 and int4 store weights in 8 and 4 bits, whatever the model's dtype.
            A model's 4-bit weights stay in 4 bits. fp8, only on GPUs, also computes the layers'
            products in 8 bits. On GPUs the dtype must be fp16 or bf16.
        lora: limits of the adapters to support.
        release: move the model's weights to the runner instead of copying them.

    Raises:
        UnsupportedError: for quantized weights where the kernels cannot run.
        ValueError: if the cache cannot hold one context, the model has an unmerged adapter that
            the kernels would ignore, or int8 or fp8 is requested for 4-bit weights.
    """
    if model.adapter is not None:
        raise ValueError("the model's adapter must be merged first: gptj.adapters.lora.merge_lora")
    if is_int4(model):
        if quantization in ("int8", "fp8"):
            raise ValueError(
                f"quantization={quantization} needs the original weights, but the model's are in 4 "
                f"bits; remedy: leave quantization out, or load the original model"
            )
        quantization = "int4"
    if not isinstance(cache, CacheShare) and cache < 1:
        raise ValueError(f"cache_tokens must be 1 or more, got {cache}")
    if model.device.type == "cpu":
        return _cpu_runner(model, _pages_on_cpu(model, cache), quantization, lora, release)
    # With a share, start with one page and measure everything else first.
    num_pages = 1 if isinstance(cache, CacheShare) else -(-cache // PAGE_SIZE)
    element_size = model.dtype.itemsize
    runner = _gpu_runner(model, num_pages, quantization, lora, release)
    if isinstance(cache, CacheShare):
        fit_cache(runner, cache, element_size)
    return runner


def freed_memory(model: GPTJForCausalLM, quantization: Quantization) -> int:
    """Bytes of the GPU's memory that `best_runner` frees by packing the weights; 0 on a CPU."""
    if model.device.type == "cpu" or quantization == "none":
        return 0
    return freed_by_packing(model, quantization)


def _cpu_runner(
    model: GPTJForCausalLM,
    num_pages: int,
    quantization: Quantization,
    lora: LoRALimits | None,
    release: bool,
) -> Runner:
    try:
        kind = kind_of(model, quantization)
        return CpuRunner(model, num_pages, kind, lora=lora, release=release)
    except UnsupportedError as error:
        fall_back(error, quantization)
        return TorchRunner(model, num_pages)


def _gpu_runner(
    model: GPTJForCausalLM,
    num_pages: int,
    quantization: Quantization,
    lora: LoRALimits | None,
    release: bool,
) -> ResizableRunner:
    try:
        format: Format | None = None if quantization == "none" else quantization
        operations = operations_for(model, lora, format)
        return CudaRunner(
            model, num_pages, operations, quantization=format, lora=lora, release=release
        )
    except UnsupportedError as error:
        fall_back(error, quantization)
        return TorchRunner(model, num_pages)


def fall_back(error: UnsupportedError, quantization: Quantization) -> None:
    """Log that PyTorch computes instead. UnsupportedError if it cannot, for quantized weights."""
    if quantization != "none":
        raise UnsupportedError(f"quantization={quantization} is not available: {error}") from error
    logger.warning("the model runs on PyTorch, without our kernels: %s", error)


def _pages_on_cpu(model: GPTJForCausalLM, cache: int | CacheShare) -> int:
    if isinstance(cache, CacheShare):
        cache = tokens_within(
            model.config,
            free_bytes(model.device),
            share=cache.share,
            element_size=model.dtype.itemsize,
            most=cache.limits.max_num_seqs * model.config.n_positions,
        )
    return -(-cache // PAGE_SIZE)


def kind_of(model: GPTJPreTrainedModel, quantization: Quantization) -> Kind:
    """The kernels' kind of weights. Raises UnsupportedError."""
    if quantization == "fp8":
        raise UnsupportedError("it needs a GPU; remedy: quantization=int8")
    kind = KINDS.get(model.dtype) if quantization == "none" else quantization
    if kind is None:
        raise UnsupportedError(f"the kernels do not support {model.dtype}")
    return kind
