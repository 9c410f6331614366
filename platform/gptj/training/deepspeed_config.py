"""Our settings as a DeepSpeed config, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from gptj.data.batches import micro_batches
from gptj.training.sections import DeepSpeedSettings, OptimizerSettings
from gptj.training.settings import Settings

NEVER = 10**9
# Elements of a gradient bucket. DeepSpeed's default of 500 million takes 2 GB in bf16, even for an
# adapter. Larger matrices get a bucket of their own.
BUCKET = 50_000_000


def deepspeed_config(settings: Settings, device_type: str, world_size: int) -> dict[str, Any]:
    """The `config` of deepspeed.initialize for `world_size` workers on "cpu" or "cuda".

    https://www.deepspeed.ai/docs/config-json
    """
    optimizer, deepspeed = settings.optimizer, settings.deepspeed
    on_gpu = device_type == "cuda"
    zero: dict[str, Any] = {
        "stage": deepspeed.stage,
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
        "overlap_comm": on_gpu,  # needs streams
    }
    if deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if deepspeed.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    gradient_accumulation_steps = micro_batches(
        settings.batch_size, world_size, settings.micro_batch_size
    )
    own = {"zero_allow_untested_optimizer": True}  # see gptj.training.optimizer
    sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    return {
        # Must be the product of micro-batch, accumulation and world size, even if the real batch
        # does not divide and is smaller.
        "train_batch_size": settings.micro_batch_size * gradient_accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": optimizer.gradient_clipping if clips_gradients(deepspeed) else 0.0,
        **(own if optimizer.moments == "8bit" else {"optimizer": _adamw(optimizer, on_gpu)}),
        "zero_optimization": zero,
        **(sums if sums_in_fp32(deepspeed, gradient_accumulation_steps) else {}),
        "bf16": {"enabled": deepspeed.precision == "bf16"},
        "fp16": {"enabled": deepspeed.precision == "fp16"},
        "steps_per_print": NEVER,  # the loop reports
    }


def _adamw(optimizer: OptimizerSettings, on_gpu: bool) -> dict[str, Any]:
    # PyTorch's on CPUs, fused: 8 to 20 times as fast as its default there, and without
    # temporary tensors. DeepSpeed's own are for GPUs and offloading.
    on_cpu = {} if on_gpu else {"torch_adam": True, "fused": True}
    return {
        "type": "AdamW",
        "params": {
            "lr": optimizer.learning_rate,
            "betas": [optimizer.beta1, optimizer.beta2],
            "eps": optimizer.epsilon,
            "weight_decay": optimizer.weight_decay,
            **on_cpu,
        },
    }


def sums_in_fp32(deepspeed: DeepSpeedSettings, micro_batches: int) -> bool:
    """Whether the gradients of a step's micro-batches are added up in fp32, though they are bf16.

    In bf16, with 8 bits, what is added is rounded to the sum, which stops growing at 256 equal
    gradients: see jobs/README.md for how far it was off. At stage 2 both take as much memory, at
    stage 3 fp32 two bytes a weight more. At stages 0 and 1 DeepSpeed has no such sum for our
    optimizers; at stage 2 with offload_optimizer it would lie on the GPU, in whole four bytes.
    """
    if deepspeed.precision != "bf16" or micro_batches == 1:
        return False
    return deepspeed.stage == 3 or (deepspeed.stage == 2 and not deepspeed.offload_optimizer)


def sums_in_bf16(deepspeed: DeepSpeedSettings, micro_batches: int) -> bool:
    """Whether the gradients of a step's micro-batches are added up in bf16."""
    several = deepspeed.precision == "bf16" and micro_batches > 1
    return several and not sums_in_fp32(deepspeed, micro_batches)


def clips_gradients(deepspeed: DeepSpeedSettings) -> bool:
    """Whether DeepSpeed clips; in fp32 at stage 0 it discards the norm, so the loop clips."""
    return deepspeed.stage > 0 or deepspeed.precision != "fp32"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters: matrices with weight decay, biases and norms without."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        # At ZeRO stage 3 a parameter is empty, but has its full shape in ds_shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (matrices if len(shape) > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # an adapter may have no vectors


def learning_rate_share(optimizer: OptimizerSettings, step: int, total: int) -> float:
    """The learning rate of a step (from 0) of `total`, as a share of the highest."""
    if step < optimizer.warmup_steps:
        return (step + 1) / (optimizer.warmup_steps + 1)
    if optimizer.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - optimizer.warmup_steps) / max(1, total - optimizer.warmup_steps))
    falling = (
        1 - progress if optimizer.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    )
    return optimizer.final_share + (1 - optimizer.final_share) * falling
