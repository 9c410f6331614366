"""Chooses the fastest runner for a model on this machine."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from gptj.engine.cache_size import CacheShare, fit_cache, free_bytes, tokens_within
from gptj.engine.runners.base import PAGE_SIZE, ResizableRunner, Runner
from gptj.engine.runners.cpu.library import UnsupportedError
from gptj.engine.runners.cpu.packing import Kind
from gptj.engine.runners.cpu.runner import CpuRunner
from gptj.engine.runners.cuda.fp8 import FP8
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.engine.runners.cuda.support import check_fp8, operations_for
from gptj.engine.runners.cuda.weights import Format, freed_by_packing
from gptj.engine.runners.lora import LoRALimits
from gptj.engine.runners.torch_runner import TorchRunner
from gptj.layers.int4 import is_int4
from gptj.model import GPTJForCausalLM
from gptj.pretrained import GPTJPreTrainedModel

logger = logging.getLogger(__name__)

IntQuantization = Literal["none", "int8", "int4"]
Quantization = IntQuantization | Literal["fp8"]
KVCacheDtype = Literal["auto", "fp8"]  # auto: the model's

KINDS: dict[torch.dtype, Kind] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def best_runner(
    model: GPTJForCausalLM,
    cache: int | CacheShare,
    *,
    quantization: Quantization = "none",
    kv_cache_dtype: KVCacheDtype = "auto",
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
        kv_cache_dtype: fp8 halves the cache, on GPUs that `check_formats` accepts.
        lora: limits of the adapters to support.
        release: move the model's weights to the runner instead of copying them.

    Raises:
        UnsupportedError: for quantized weights or an fp8 cache where the kernels cannot run.
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
    check_formats(quantization, kv_cache_dtype, model.device, model.dtype)
    if not isinstance(cache, CacheShare) and cache < 1:
        raise ValueError(f"cache_tokens must be 1 or more, got {cache}")
    if model.device.type == "cpu":
        return _cpu_runner(model, _pages_on_cpu(model, cache), quantization, lora, release)
    # With a share, start with one page and measure everything else first.
    num_pages = 1 if isinstance(cache, CacheShare) else -(-cache // PAGE_SIZE)
    dtype = cache_dtype(kv_cache_dtype, model.dtype)  # before the model is released
    runner = _gpu_runner(model, num_pages, quantization, kv_cache_dtype, lora, release)
    if isinstance(cache, CacheShare):
        fit_cache(runner, cache, dtype)
    return runner


def cache_dtype(kv_cache_dtype: KVCacheDtype, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype of cached keys and values."""
    return FP8 if kv_cache_dtype == "fp8" else model_dtype


def check_formats(
    quantization: Quantization,
    kv_cache_dtype: KVCacheDtype,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Check that a device has what fp8 needs, for a model of that dtype.

    Raises:
        UnsupportedError: with the remedy.
    """
    if quantization == "fp8":
        try:
            check_fp8(device, dtype, "quantization")
        except UnsupportedError as error:
            fall_back(error, quantization)
    if kv_cache_dtype == "fp8":
        try:
            check_fp8(device, dtype, "kv_cache_dtype")
        except UnsupportedError as error:
            fall_back(error, kv_cache_dtype=kv_cache_dtype)


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
    kv_cache_dtype: KVCacheDtype,
    lora: LoRALimits | None,
    release: bool,
) -> ResizableRunner:
    try:
        given: Format | None = None if quantization == "none" else quantization
        dtype = cache_dtype(kv_cache_dtype, model.dtype)
        operations = operations_for(model, lora, given, dtype)
        return CudaRunner(
            model,
            num_pages,
            operations,
            quantization=given,
            cache_dtype=dtype,
            lora=lora,
            release=release,
        )
    except UnsupportedError as error:
        fall_back(error, quantization, kv_cache_dtype)
        return TorchRunner(model, num_pages)


def fall_back(
    error: UnsupportedError,
    quantization: Quantization = "none",
    kv_cache_dtype: KVCacheDtype = "auto",
) -> None:
    """Log that PyTorch computes instead.

    Raises:
        UnsupportedError: if it cannot, for quantized weights or an fp8 cache.
    """
    given = []
    if quantization != "none":
        given.append(f"quantization={quantization}")
    if kv_cache_dtype != "auto":
        given.append(f"kv_cache_dtype={kv_cache_dtype}")
    if given:
        raise UnsupportedError(f"{' with '.join(given)} is not available: {error}") from error
    logger.warning("the model runs on PyTorch, without our kernels: %s", error)


def _pages_on_cpu(model: GPTJForCausalLM, cache: int | CacheShare) -> int:
    if isinstance(cache, CacheShare):
        cache = tokens_within(
            model.config,
            free_bytes(model.device),
            share=cache.share,
            dtype=model.dtype,
            most=cache.limits.max_num_seqs * model.config.n_positions,
        )
    return -(-cache // PAGE_SIZE)


def kind_of(model: GPTJPreTrainedModel, quantization: Quantization) -> Kind:
    """The kernels' kind of weights. Raises UnsupportedError."""
    assert quantization != "fp8", "it is for GPUs"
    kind = KINDS.get(model.dtype) if quantization == "none" else quantization
    if kind is None:
        raise UnsupportedError(f"the kernels do not support {model.dtype}")
    return kind
