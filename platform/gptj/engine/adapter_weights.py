"""Convert a stored adapter to a runner's weights, checked against its base model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from reprlib import repr as shown

import torch
from torch import Tensor

from gptj.adapters.config import TARGET_MODULES
from gptj.adapters.stored import StoredAdapter
from gptj.config import GPTJConfig
from gptj.engine.runners.lora import LoRAPair, LoRAWeights
from gptj.errors import CheckpointError

_NAME = re.compile(
    r"transformer\.h\.(?P<layer>\d{1,4})\.(?:attn|mlp)\.(?P<module>\w+)\.lora_(?P<half>[AB])\.weight"
)


def lora_weights(stored: StoredAdapter, config: GPTJConfig, max_rank: int) -> LoRAWeights:
    """An adapter's matrices in fp32, with its scaling in B.

    Args:
        config: of the base model, a language model.

    Raises:
        CheckpointError: naming what is missing, damaged, of the wrong shape or not supported.
    """
    place, wanted = stored.address, stored.config
    if stored.architecture not in (None, "GPTJForCausalLM"):
        raise CheckpointError(
            f"{place} is an adapter of a {stored.architecture}, but this service generates text"
        )
    if wanted.modules_to_save:
        raise CheckpointError(
            f"{place} has a head of its own (modules_to_save={list(wanted.modules_to_save)}), "
            f"which is not supported alongside other adapters; remedy: merge it into its base "
            f"(jobs/merge_adapter.py)"
        )
    if wanted.rank > max_rank:
        raise CheckpointError(
            f"{place} has the rank {wanted.rank}, but this service supports ranks up to {max_rank} "
            f"(max_lora_rank)"
        )
    tensors = dict(stored.tensors)
    digest = hashlib.sha256()
    layers = []
    for layer in range(config.n_layer):
        pairs = {}
        for module in wanted.target_modules:
            pair = LoRAPair(
                *(
                    _taken(tensors, name, shape, place)
                    for name, shape in _parts(config, layer, module, wanted.rank)
                )
            )
            pair = replace(pair, b_OR=pair.b_OR * wanted.scaling)
            for half in (pair.a_RI, pair.b_OR):
                if not half.isfinite().all():
                    raise CheckpointError(
                        f"{place} has non-finite values in {module} of layer {layer}"
                    )
                digest.update(f"{layer}.{module}.{tuple(half.shape)}".encode())
                digest.update(half.numpy().data)
            pairs[module] = pair
        layers.append(pairs)
    if tensors:
        raise CheckpointError(f"{place} {_unexpected(sorted(tensors)[0], config)}")
    return LoRAWeights(wanted.rank, tuple(layers), digest.digest())


def shape_of(config: GPTJConfig, module: str) -> tuple[int, int]:
    """The outputs and inputs of a block's linear layer."""
    width, inner = config.n_embd, config.inner_dim
    return {"fc_in": (inner, width), "fc_out": (width, inner)}.get(module, (width, width))


def _parts(
    config: GPTJConfig, layer: int, module: str, rank: int
) -> Iterator[tuple[str, tuple[int, int]]]:
    parent = "mlp" if module.startswith("fc_") else "attn"
    stem = f"transformer.h.{layer}.{parent}.{module}"
    outputs, inputs = shape_of(config, module)
    yield f"{stem}.lora_A.weight", (rank, inputs)
    yield f"{stem}.lora_B.weight", (outputs, rank)


def _taken(tensors: dict[str, Tensor], name: str, shape: tuple[int, int], place: str) -> Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise CheckpointError(f"{place} is incomplete: {name} is missing")
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{name} of {place} has the shape {tuple(tensor.shape)}, but this base model needs "
            f"{shape}"
        )
    # A copy: the file may be mapped, and must not be held open.
    return torch.empty(shape, dtype=torch.float32).copy_(tensor)


def _unexpected(name: str, config: GPTJConfig) -> str:
    match = _NAME.fullmatch(name)
    if match is None or match["module"] not in TARGET_MODULES:
        return (
            f"has {shown(name)}, which is not supported: only LoRA on {', '.join(TARGET_MODULES)}"
        )
    if int(match["layer"]) >= config.n_layer:
        return f"has {shown(name)}, but this base model has {config.n_layer} layers"
    return f"has {shown(name)}, whose module is not among its target_modules"
