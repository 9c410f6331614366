"""Write a model folder atomically: configuration, tensors and tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from gptj.adapters.base import Base
from gptj.adapters.config import LoRAConfig
from gptj.adapters.stored import ADAPTER_FILE, PREFIX, TASK_TYPES
from gptj.checkpoints.folder import ADAPTER_CONFIG, BASE, CONFIG, TRAINING
from gptj.checkpoints.manifest import FolderWriter
from gptj.checkpoints.weights import SHARD_BYTES, TensorSpec, write_file, write_weights
from gptj.config import GPTJConfig
from gptj.serialization.json_object import to_json
from gptj.tokenizer import GPTJTokenizer


def save_folder(
    address: str | os.PathLike[str],
    config: GPTJConfig,
    specs: Sequence[TensorSpec],
    tensors: Iterable[Tensor],
    *,
    tokenizer: GPTJTokenizer | None = None,
    training: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    fence: Callable[[], None] = lambda: None,
) -> None:
    """Write a model folder from tensors that arrive one at a time, in the order of `specs`.

    So a sharded model can be written without gathering it.

    Args:
        address: a new folder, local or `s3://`.
        training: how the model was trained, for `training.json`.
        fence: see FolderWriter.

    Raises:
        AlreadyExistsError: if there is a finished checkpoint at the address.
    """
    with FolderWriter(address, fence=fence) as writer:
        write_weights(writer, specs, tensors, shard_bytes)
        write_small_files(writer, config, tokenizer, training)


def save_adapter_folder(
    address: str | os.PathLike[str],
    config: GPTJConfig,
    adapter: LoRAConfig,
    specs: Sequence[TensorSpec],
    tensors: Iterable[Tensor],
    *,
    base: Base,
    tokenizer: GPTJTokenizer | None = None,
    training: Mapping[str, Any] | None = None,
    fence: Callable[[], None] = lambda: None,
) -> None:
    """Like save_folder, for an adapter: a folder that PEFT can read, plus our own metadata.

    Args:
        config: the adapted model's, with its class in `architectures`.
        specs: named as in the model.
    """
    fields = {
        **adapter.to_peft(),
        "task_type": TASK_TYPES.get((config.architectures or [""])[0]),
        "base_model_name_or_path": base.address,
        "revision": base.commit or base.revision,
    }
    named = [replace(spec, name=PREFIX + spec.name) for spec in specs]
    with FolderWriter(address, fence=fence) as writer:
        write_file(writer, ADAPTER_FILE, named, iter(tensors))
        writer.write(BASE, _json(base.to_dict()))
        writer.write(ADAPTER_CONFIG, _json(fields))
        write_small_files(writer, config, tokenizer, training)


def write_small_files(
    writer: FolderWriter,
    config: GPTJConfig,
    tokenizer: GPTJTokenizer | None,
    training: Mapping[str, Any] | None,
) -> None:
    """Write everything but the weights, after them.

    The configuration comes last: without it, nothing mistakes an unfinished folder for a model.
    """
    for name, content in (tokenizer.files() if tokenizer is not None else {}).items():
        writer.write(name, content)
    if training is not None:
        writer.write(TRAINING, _json(training))
    writer.write(CONFIG, config.to_json().encode())


def _json(fields: Mapping[str, Any]) -> bytes:
    return (to_json(fields, indent=2) + "\n").encode()
