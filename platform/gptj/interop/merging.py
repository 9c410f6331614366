"""Merge an adapter into its base model's folder, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gptj.adapters.base import Base
from gptj.adapters.config import HEADS
from gptj.adapters.lora import add_product
from gptj.adapters.stored import (
    HEAD_OF,
    StoredAdapter,
    put_adapter,
    read_adapter,
)
from gptj.checkpoints.folder import CONFIG, TRAINING, ModelFolder
from gptj.checkpoints.skeleton import without_weights
from gptj.checkpoints.weights import SHARD_BYTES
from gptj.config import GPTJConfig, parse_dtype
from gptj.errors import CheckpointError
from gptj.interop.conversion import read_all, specs_of
from gptj.interop.importer import check_new
from gptj.interop.source import Source, open_source
from gptj.interop.tensors import StoredTensor, narrowed
from gptj.model import HEAD_CLASSES, GPTJModel
from gptj.pretrained import GPTJPreTrainedModel
from gptj.pretrained.saving import save_folder
from gptj.storage.addresses import normalized
from gptj.tokenizer import GPTJTokenizer

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")  # a tokenizer has one of these


def merge_adapter(
    base: str,
    adapter: str,
    destination: str,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> GPTJConfig:
    """Write a model folder equivalent to the base with the adapter; see merge_lora.

    The write is atomic. Returns the configuration. The tokenizer and `training.json` are the
    adapter's or, if it has none, the base's.

    Args:
        base, adapter: folders, local or `s3://`, or hub ids.
        destination: a new folder, local or `s3://`.
        dtype: float16, bfloat16 or float32; None: the base's.
        revision: branch, tag or commit of a base on the hub; None: the commit that the adapter was
            trained on, if it records this base, or else the default branch.

    Raises:
        FileNotFoundError: if there is no base or no adapter.
        CheckpointError: naming what is damaged or not supported, or if the adapter belongs to
            another model.
        ValueError: if the destination is within the base or the adapter.
        AlreadyExistsError: if the destination is not empty.
    """
    target = parse_dtype(dtype)
    base, adapter, destination = normalized(base), normalized(adapter), normalized(destination)
    check_new(destination, base, adapter)
    with ModelFolder.open(adapter, weights=True) as folder, ExitStack() as stack:
        stored = read_adapter(folder)
        place = Base.named(stored.known_base, base, revision)
        try:
            source = stack.enter_context(open_source(base, revision=place.pin))
        except FileNotFoundError as error:
            if place != stored.known_base:
                raise
            raise place.missing(adapter, error) from error
        _check_base(stored, place)
        config = _config(source, folder, stored)
        tensors = _merged(source, stored, config)
        specs = specs_of(tensors, target or source.config.dtype, config)
        save_folder(
            destination,
            config,
            specs,
            read_all(tensors, specs),
            tokenizer=_tokenizer(folder, config) or source.tokenizer,
            training=_training(folder) or source.training,
            shard_bytes=shard_bytes,
        )
    return config


def _check_base(adapter: StoredAdapter, base: Base) -> None:
    if adapter.known_base is not None:  # PEFT's need not name one
        found = Base.at(base.address, base.pin)
        adapter.known_base.check(adapter.address, found)


def _config(source: Source, folder: ModelFolder, adapter: StoredAdapter) -> GPTJConfig:
    """The merged model's configuration; CheckpointError if the adapter does not fit the base."""
    if CONFIG in folder:
        config = GPTJConfig.from_folder(folder)
    else:
        config = GPTJConfig.from_dict(adapter.adapted_fields(source.config.to_dict()))
    name = adapter.architecture or (config.architectures or [""])[0]
    cls = HEAD_CLASSES.get(name)
    if cls is None:
        raise CheckpointError(
            f"{adapter.address}: {name or 'no class'} is not one of our GPT-J classes"
        )
    config.architectures = [name]
    config.dtype = source.config.dtype
    with without_weights():
        model = cls(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    put_adapter(model, adapter)  # checks names and shapes; there are no weights to copy to
    given = {tensor.name: tensor.shape for tensor in _base_tensors(source, cls)}
    given |= {n: tuple(t.shape) for n, t in adapter.tensors.items() if n in expected}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise CheckpointError(
                f"{adapter.address} is not for the model {source.address}: {name} has the "
                f"shape {given.get(name)}, but should have {expected.get(name)}"
            )
    return config


def _merged(source: Source, adapter: StoredAdapter, config: GPTJConfig) -> list[StoredTensor]:
    """The merged model's tensors, in its order."""
    cls = HEAD_CLASSES[(config.architectures or [""])[0]]
    tensors = {tensor.name: tensor for tensor in _base_tensors(source, cls)}
    for name, values in adapter.tensors.items():
        if ".lora_" not in name:
            tensors[name] = _in_memory(name, values)
    for name, a in adapter.tensors.items():
        layer, marker, _ = name.partition(".lora_A.")
        if marker:
            b, weight = adapter.tensors[f"{layer}.lora_B.weight"], f"{layer}.weight"
            tensors[weight] = _with_product(tensors[weight], a, b, adapter.config.scaling)
    return list(tensors.values())


def _base_tensors(source: Source, cls: type[GPTJPreTrainedModel]) -> list[StoredTensor]:
    """The base's tensors under the class's names, without other classes' heads."""
    others = tuple(f"{head}." for head in HEADS if head != HEAD_OF.get(cls.__name__))
    kept = [tensor for tensor in source.tensors if not tensor.name.startswith(others)]
    if source.config.architectures == [GPTJModel.__name__] and cls is not GPTJModel:
        kept = [t.renamed(f"{GPTJModel.base_model_prefix}.{t.name}") for t in kept]
    return kept


def _in_memory(name: str, values: Tensor) -> StoredTensor:
    def load(dtype: torch.dtype) -> Tensor:
        return narrowed(values, dtype, name)

    return StoredTensor(name, tuple(values.shape), values.dtype, load)


def _with_product(tensor: StoredTensor, a: Tensor, b: Tensor, scaling: float) -> StoredTensor:
    def load(dtype: torch.dtype) -> Tensor:
        values = tensor.load(torch.float32)
        add_product(values, a, b, scaling)
        return narrowed(values, dtype, tensor.name)

    return replace(tensor, load=load)


def _tokenizer(adapter: ModelFolder, config: GPTJConfig) -> GPTJTokenizer | None:
    """The adapter's own tokenizer, if it has one. CheckpointError if the model is too small."""
    if not any(name in adapter for name in TOKENIZER_FILES):
        return None
    tokenizer = GPTJTokenizer.from_folder(adapter)
    tokenizer.check_rows(config.vocab_size, adapter.address)
    return tokenizer


def _training(adapter: ModelFolder) -> Mapping[str, Any] | None:
    if adapter.manifest is None or TRAINING not in adapter:
        return None
    return adapter.read_object(TRAINING)
