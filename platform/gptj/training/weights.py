"""Build a run's model for DeepSpeed and export it, with at most one copy per process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptj.adapters.base import Base
from gptj.adapters.config import LoRAConfig
from gptj.adapters.lora import NEW_HEADS, adapter_parameters, add_lora
from gptj.adapters.quantization import Quantization, count_weights, quantize_blocks
from gptj.checkpoints.skeleton import without_weights
from gptj.checkpoints.weights import TensorSpec
from gptj.config import GPTJConfig
from gptj.environment.extras import Extra, check_installed
from gptj.model import GPTJForCausalLM
from gptj.pretrained import GPTJPreTrainedModel
from gptj.pretrained.saving import save_adapter_folder, save_folder
from gptj.tokenizer import GPTJTokenizer
from gptj.training.settings import Settings

logger = logging.getLogger(__name__)
deepspeed = Extra("deepspeed", "training")
check_installed("deepspeed", "training", extra="train")

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(
    cls: type[GPTJPreTrainedModel],
    config: GPTJConfig,
    settings: Settings,
    deepspeed_settings: dict[str, Any],
    rank: int,
    device: torch.device,
) -> GPTJPreTrainedModel:
    """The initial model: a checkpoint's weights, or new ones from the seed.

    Only rank 0 has real weights; deepspeed.initialize broadcasts them. At stage 3 each parameter is
    sharded across ranks as it is created.

    Args:
        device: this worker's; quantizes an adapter's frozen weights.
    """
    source = None
    adapter, quantization = None, None
    if settings.adapter is not None:
        adapter = settings.adapter.lora(NEW_HEADS.get(cls.__name__, ()))
        quantization = settings.adapter.quantization
    if rank == 0:
        torch.manual_seed(settings.seed)
        if settings.model.checkpoint:
            source = cls.from_pretrained(
                settings.model.checkpoint,
                revision=settings.model.revision or None,
                config=config,
            )
        else:
            source = cls(config)
        if settings.deepspeed.precision == "fp32":
            source = source.float()
        if adapter is not None:
            if quantization is not None:
                quantize_blocks(source, quantization, device)
            add_lora(source, adapter)
            trained = source.num_parameters(only_trainable=True)
            logger.info("training %d of %d parameters", trained, count_weights(source))
    # Loading may have found that a checkpoint's head differs from its embedding.
    tied = [config.tie_word_embeddings if source is None else source.config.tie_word_embeddings]
    dist.broadcast_object_list(tied)
    config.tie_word_embeddings = tied[0]
    if settings.deepspeed.stage < 3:
        if source is not None:
            return source
        with without_weights():
            model = _with_adapter(cls(config), adapter, quantization)
        model = model.to_empty(device="cpu")
        if isinstance(model, GPTJForCausalLM):
            model.tie_weights()  # to_empty unties a shared matrix
        return model
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_settings):
        model = _with_adapter(cls(config), adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if source is not None:
                    parameter.copy_(source.get_parameter(name))
    return model


def _with_adapter(
    model: GPTJPreTrainedModel,
    adapter: LoRAConfig | None,
    quantization: Quantization | None = None,
) -> GPTJPreTrainedModel:
    if quantization is not None:
        quantize_blocks(model, quantization)
    if adapter is not None:
        add_lora(model, adapter)
    return model


def undo_first_step(engine: Any) -> None:
    """Reset the optimizer to before its first step.

    At stage 0 in half precision DeepSpeed takes a step without gradients to create the optimizer's
    state. Adam would then bias-correct the first update as the second (0.743 of the right size),
    and the fp32 masters have decayed once (https://github.com/deepspeedai/DeepSpeed/issues/5104).
    """
    wrapper = engine.optimizer
    if isinstance(wrapper, deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer):
        pairs = [
            pair
            for masters, weights in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
            for pair in zip(masters, weights, strict=True)
        ]
    elif isinstance(wrapper, deepspeed.runtime.fp16.fused_optimizer.FP16_Optimizer):
        pairs = list(zip(wrapper.fp32_groups_flat, wrapper.fp16_groups_flat, strict=True))
    else:  # fp32: no masters, no step
        return
    wrapper.optimizer.state.clear()  # the next step recreates it
    with torch.no_grad():
        for master, weight in pairs:
            master.copy_(weight)


def all_finite(model: nn.Module) -> Tensor:
    """Whether this rank's trained weights are all finite; stays on their device, without a sync."""
    extremes: list[Tensor] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        part = _own_part(parameter)
        if part.numel():
            extremes += torch.aminmax(part)  # NaN, if one is among them
    return torch.stack([each.float() for each in extremes]).isfinite().all()


def _own_part(parameter: nn.Parameter) -> Tensor:
    """The parameter, or at stage 3 this rank's shard, whose padding DeepSpeed leaves undefined."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    sharded: Any = parameter
    start = sharded.ds_zero_partition_rank * sharded.partition_numel()
    part: Tensor = sharded.ds_tensor.detach().view(-1)
    return part[: max(0, sharded.ds_numel - start)]


def export_model(
    model: GPTJPreTrainedModel,
    address: str,
    settings: Settings,
    tokenizer: GPTJTokenizer,
    training: dict[str, Any],
    rank: int,
    *,
    base: Base | None = None,
    fence: Callable[[], None] = lambda: None,
) -> None:
    """Write the folder of the trained model or adapter, in the training precision.

    All ranks must call it. At stage 3 each parameter is gathered, written by rank 0 and released
    before the next.

    Args:
        base: an adapter's base model.
        fence: see FolderWriter.
    """
    dtype = PRECISIONS[settings.deepspeed.precision]
    config = model.config_to_save()
    config.dtype = dtype
    adapter = model.adapter
    parameters = adapter_parameters(model) if adapter else dict(model.named_parameters())
    specs = [TensorSpec(name, _shape(p), dtype) for name, p in parameters.items()]
    tensors = _gathered(parameters, settings.deepspeed.stage)
    if rank != 0:
        for _ in tensors:
            pass  # take part in gathering
    elif adapter is None:
        save_folder(
            address, config, specs, tensors, tokenizer=tokenizer, training=training, fence=fence
        )
    else:
        assert base is not None
        save_adapter_folder(
            address,
            config,
            adapter,
            specs,
            tensors,
            base=base,
            tokenizer=tokenizer,
            training=training,
            fence=fence,
        )


def _gathered(parameters: dict[str, nn.Parameter], stage: int) -> Iterator[Tensor]:
    for parameter in parameters.values():
        if stage < 3:
            yield parameter
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                yield parameter


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The full shape, even at ZeRO stage 3, where a parameter is empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
