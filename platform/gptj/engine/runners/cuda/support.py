"""Checks that the GPU, the model and the installation support our kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from gptj.engine.runners.cpu.library import UnsupportedError
from gptj.engine.runners.cpu.packing import check_int4_widths
from gptj.engine.runners.cuda.fp8 import ALIGNMENT, FP8
from gptj.engine.runners.cuda.operations import Operations
from gptj.engine.runners.cuda.weights import Format
from gptj.engine.runners.lora import LoRALimits
from gptj.environment.extras import Extra
from gptj.model import GPTJForCausalLM

if TYPE_CHECKING:
    from gptj.engine.runners.cuda.launch import TritonOperations

launch = Extra("gptj.engine.runners.cuda.launch", "computing with our GPU kernels", "triton")
tuned_linear = Extra(
    "gptj.engine.runners.cuda.tuned_linear", "computing with our GPU kernels", "triton"
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_CAPABILITY = (8, 0)  # Ampere: bf16 and asynchronous copies
FP8_CAPABILITY = (8, 9)  # Ada and Hopper: tensor cores for e4m3, and conversions


def operations_for(
    model: GPTJForCausalLM,
    lora: LoRALimits | None = None,
    quantization: Format | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Operations:
    """The kernels, after a trial run on the model's device.

    Args:
        lora: limits of the adapters to support, if any.
        quantization: of the weights.
        cache_dtype: None: the model's.

    Raises:
        UnsupportedError: if the GPU or the model is not supported, or Triton does not work.
    """
    config, device = model.config, model.device
    if device.type != "cuda":
        raise UnsupportedError(f"the model is on {device}")
    if config.activation_function != "gelu_new":
        raise UnsupportedError(
            f"the kernels support only gelu_new, but the model has {config.activation_function}"
        )
    if model.dtype not in DTYPES:
        raise UnsupportedError(f"the kernels do not support {model.dtype}")
    if quantization == "fp8":
        if config.n_embd % ALIGNMENT or config.inner_dim % ALIGNMENT:
            raise UnsupportedError(
                f"fp8 needs n_embd={config.n_embd} and n_inner={config.inner_dim} to be multiples "
                f"of {ALIGNMENT}"
            )
        check_fp8(device, model.dtype, "quantization")
    if cache_dtype == FP8:
        check_fp8(device, model.dtype, "kv_cache_dtype")
    if quantization is not None and model.dtype == torch.float32:
        raise UnsupportedError(
            "on GPUs quantized weights need a model in float16 or bfloat16, and this one is in "
            "float32; remedy: dtype=bfloat16"
        )
    if quantization == "int4":
        check_int4_widths(config)
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < MIN_CAPABILITY:
        raise UnsupportedError(
            f"{properties.name} has compute capability {properties.major}.{properties.minor}, but "
            f"the kernels need {'.'.join(map(str, MIN_CAPABILITY))} or more"
            + ("; remedy: serve the model's original weights" if quantization is not None else "")
        )
    try:
        new_operations = launch.TritonOperations.on
    except ImportError as error:
        raise UnsupportedError(f"Triton cannot be imported: {error}") from error
    operations: TritonOperations = new_operations(device, config, model.dtype)
    with torch.cuda.device(device):
        try_out(operations, device, lora, quantization, cache_dtype)
        torch.cuda.synchronize()
    return operations


def check_fp8(
    device: torch.device, dtype: torch.dtype, setting: Literal["quantization", "kv_cache_dtype"]
) -> None:
    """Check that a device computes with fp8.

    Args:
        dtype: the model's.
        setting: which asks for it.

    Raises:
        UnsupportedError: with the remedy.
    """
    instead = {"quantization": "quantization=int8", "kv_cache_dtype": "kv_cache_dtype=auto"}[
        setting
    ]
    if device.type != "cuda":
        raise UnsupportedError(f"fp8 needs a GPU, but the model is on {device}; remedy: {instead}")
    if dtype not in (torch.float16, torch.bfloat16):
        others = "" if setting == "quantization" else f", or {instead}"  # int8 needs the same
        raise UnsupportedError(
            f"fp8 needs a model in float16 or bfloat16, and this one is in "
            f"{str(dtype).removeprefix('torch.')}; remedy: dtype=float16{others}"
        )
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    if capability < FP8_CAPABILITY:
        if setting == "quantization" and capability < MIN_CAPABILITY:
            instead = "leave quantization out"
        raise UnsupportedError(
            f"{properties.name} has compute capability {properties.major}.{properties.minor}, but "
            f"fp8 needs {'.'.join(map(str, FP8_CAPABILITY))} or more; remedy: {instead}"
        )


def try_out(
    operations: TritonOperations,
    device: torch.device,
    lora: LoRALimits | None = None,
    quantization: Format | None = None,
    cache_dtype: torch.dtype | None = None,
) -> None:
    """Run each kernel once, while we can still fall back to PyTorch.

    Triton needs a C compiler and a writable cache, and kernels need shared memory and registers;
    failures only show when compiling or launching them.

    Raises:
        UnsupportedError: naming what failed.
    """
    try:
        operations.try_out(device, lora, quantization, cache_dtype)
    except tuned_linear.LAUNCH_ERRORS as error:
        kind = type(error).__name__
        raise UnsupportedError(f"Triton cannot compile for {device}: {kind}: {error}") from error
