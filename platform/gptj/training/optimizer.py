"""AdamW with its moments in 8 bits, which DeepSpeed does not have; for DeepSpeed to wrap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gptj.extras import Extra
from gptj.training.sections import OptimizerSettings

bitsandbytes = Extra("bitsandbytes", "optimizer.moments=8bit")

BLOCK = 256  # numbers that share a scale, in bitsandbytes
SCALE_BYTES = 4
SMALLEST = 4096  # numbers of a tensor whose moments are in 8 bits
MOMENT_BYTES = 2 * (1 + SCALE_BYTES / BLOCK)  # of a weight's two moments


def own_optimizer(
    settings: OptimizerSettings, parameter_groups: list[dict[str, Any]]
) -> Optimizer | None:
    """The optimizer to give DeepSpeed; None: it makes its own.

    Tensors of fewer than 4096 numbers have moments in fp32. At ZeRO stages 1 and up there are
    none: DeepSpeed joins parameters, and blocks cross their borders.
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


def stored_moments(state: dict[str, Any], flat: Tensor) -> dict[str, Tensor]:
    """Codes and scales in fp32, for each number of `flat` and so for any cut of it; else nothing.

    Scales are repeated: another layout has other blocks.
    """
    found: dict[str, Tensor] = {}
    for number in (1, 2):
        codes, scales = state.get(f"state{number}"), state.get(f"absmax{number}")
        if codes is not None and scales is not None:
            spread = _spread(scales, flat)
            found |= {f"state{number}": codes.float(), f"absmax{number}": spread}
    return found


def restore_moments(optimizer: Optimizer) -> None:
    """What `stored_moments` gave, perhaps of another layout, back into bitsandbytes' own form.

    Blocks that are as they were come back bit by bit; others are quantized anew.
    """
    for flat, state in optimizer.state.items():
        for number in (1, 2):
            scales = state.pop(f"absmax{number}", None)
            if scales is None or flat.numel() < SMALLEST:
                continue  # in fp32
            kind = "dynamic" if number == 1 else "udynamic"
            values = optimizer.name2qmap[kind] = optimizer.name2qmap[kind].to(flat.device)  # type: ignore[attr-defined]
            codes = state[f"state{number}"].to(torch.uint8)
            firsts = scales.flatten()[::BLOCK].contiguous()
            if not torch.equal(_spread(firsts, flat), scales.flatten()):
                numbers = values[codes.flatten().int()] * scales.flatten()
                codes, firsts = torch.ops.bitsandbytes.quantize_blockwise(numbers, values, BLOCK)
            state |= {
                f"state{number}": codes.view(flat.shape),
                f"qmap{number}": values,
                f"absmax{number}": firsts,
            }


def _spread(scales: Tensor, flat: Tensor) -> Tensor:
    return scales.repeat_interleave(BLOCK)[: flat.numel()]
