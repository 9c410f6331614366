"""AdamW with 8-bit moments (bitsandbytes), for DeepSpeed to wrap; DeepSpeed has none itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gptj.environment.extras import Extra
from gptj.training.sections import OptimizerSettings

bitsandbytes = Extra("bitsandbytes", "optimizer.moments=8bit")

BLOCK = 256  # values that share a scale in bitsandbytes
SCALE_BYTES = 4
SMALLEST = 4096  # smaller tensors keep fp32 moments
KINDS = ("state1", "absmax1", "state2", "absmax2")
IN_FP32 = -1.0  # as a scale: the codes are fp32 values
AT_ONCE = 2**16 * BLOCK  # values quantized at once when restoring a checkpoint
# Bytes of a weight's two moments in memory, by their precision, and in a checkpoint, where 8-bit
# codes and their scales take an fp32 number each.
MOMENT_BYTES = {"fp32": 8.0, "8bit": 2 * (1 + SCALE_BYTES / BLOCK)}
STORED_MOMENT_BYTES = {"fp32": 8, "8bit": 16}


def own_optimizer(
    settings: OptimizerSettings, parameter_groups: list[dict[str, Any]]
) -> Optimizer | None:
    """The optimizer to pass to DeepSpeed; None: it creates its own.

    Tensors smaller than SMALLEST have fp32 moments. From ZeRO stage 1 on there are hardly any,
    since DeepSpeed flattens parameters together, so blocks may span several.
    """
    if settings.moments == "fp32":
        return None
    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(
        parameter_groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    return optimizer


def moment_kinds(state: dict[str, Any]) -> tuple[str, ...]:
    """Keys of `stored_moments` for a tensor's state; empty if it is not bitsandbytes'."""
    return KINDS if "state1" in state else ()


def stored_moments(state: dict[str, Any], start: int, end: int) -> dict[str, Tensor]:
    """Codes and scales, in fp32, of elements `start` to `end` of a flattened tensor.

    Scales are per element, since blocks differ between layouts. fp32 moments are stored as codes
    with the scale IN_FP32.
    """
    found: dict[str, Tensor] = {}
    for number in (1, 2):
        codes = state[f"state{number}"].flatten()[start:end].float()
        scales = state.get(f"absmax{number}")
        if scales is None:
            expanded = torch.full_like(codes, IN_FP32)
        else:
            first, last = start // BLOCK, -(-end // BLOCK)
            expanded = _expand(scales[first:last])[start - first * BLOCK : end - first * BLOCK]
        found |= {f"state{number}": codes, f"absmax{number}": expanded}
    return found


def restore_moments(optimizer: Optimizer) -> None:
    """Convert state loaded from `stored_moments`, perhaps of another layout, back in place.

    Unchanged blocks are restored bit by bit; others are requantized. Loaded state may be in host
    memory; it is moved to its tensor's device in parts.
    """
    for flat, state in optimizer.state.items():
        for number in (1, 2):
            scales = state.pop(f"absmax{number}", None)
            if scales is None:
                continue
            kind = "dynamic" if number == 1 else "udynamic"
            values = optimizer.name2qmap[kind] = optimizer.name2qmap[kind].to(flat.device)  # type: ignore[attr-defined]
            stored = zip(
                state[f"state{number}"].flatten().split(AT_ONCE),
                scales.flatten().split(AT_ONCE),
                strict=True,
            )
            parts = ((codes.to(flat.device), each.to(flat.device)) for codes, each in stored)
            if flat.numel() < SMALLEST:
                numbers = [_numbers(codes, each, values) for codes, each in parts]
                state[f"state{number}"] = torch.cat(numbers).view(flat.shape)
                continue
            blocks = [_blocks(codes, each, values) for codes, each in parts]
            state |= {
                f"state{number}": torch.cat([codes for codes, _ in blocks]).view(flat.shape),
                f"qmap{number}": values,
                f"absmax{number}": torch.cat([each for _, each in blocks]),
            }


def _blocks(codes: Tensor, scales: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as bytes, and one scale per block."""
    firsts = scales[::BLOCK].contiguous()
    if torch.equal(_expand(firsts)[: len(scales)], scales) and not (scales == IN_FP32).any():
        return codes.to(torch.uint8), firsts
    numbers = _numbers(codes, scales, values)
    quantized, firsts = torch.ops.bitsandbytes.quantize_blockwise(numbers, values, BLOCK)
    return quantized, firsts


def _numbers(codes: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    plain = scales == IN_FP32
    return torch.where(plain, codes, values[codes.masked_fill(plain, 0).int()] * scales)


def _expand(scales: Tensor) -> Tensor:
    return scales.repeat_interleave(BLOCK)
