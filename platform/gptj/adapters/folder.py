"""An adapter's folder: written from a model, read to be put into one or merged.

PEFT's `adapter_config.json` and `adapter_model.safetensors`, which PEFT loads as they are; ours are
`base.json`, the adapted model's `config.json` (with its labels), the tokenizer, `training.json`
and, written last, `manifest.json`. Folders of PEFT's own lack these, and load as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gptj import storage
from gptj.adapters.base import ADAPTER_CONFIG, BASE, Base, has_file, is_adapter
from gptj.adapters.config import HEADS, LoRAConfig
from gptj.adapters.lora import adapter_parameters, add_lora
from gptj.checkpoints.checkpoint import (
    CONFIG,
    config_of,
    load_config,
    read_config,
    write_small_files,
)
from gptj.checkpoints.hub import locate
from gptj.checkpoints.manifest import CheckpointError, FolderWriter, Manifest, read_verified
from gptj.checkpoints.skeleton import without_weights
from gptj.checkpoints.weights import TensorSpec, read_weights, write_file
from gptj.config import GPTJConfig
from gptj.model import GPTJPreTrainedModel
from gptj.serialization.json_object import parse_object, to_json
from gptj.storage.addresses import normalized
from gptj.tokenizer import GPTJTokenizer

ADAPTER_FILE = "adapter_model.safetensors"
KINDS = (
    (ADAPTER_FILE, "adapter_model.safetensors.index.json"),
    ("adapter_model.bin", "adapter_model.bin.index.json"),
)
PATTERNS = ("*.json", "adapter_model*")
PREFIX = "base_model.model."  # of PEFT's names; ours follow it
TASK_TYPES = {  # PEFT's, by our classes' names
    "GPTJForCausalLM": "CAUSAL_LM",
    "GPTJForSequenceClassification": "SEQ_CLS",
    "GPTJForQuestionAnswering": "QUESTION_ANS",
}
HEAD_OF = {
    "GPTJForCausalLM": "lm_head",
    "GPTJForSequenceClassification": "score",
    "GPTJForQuestionAnswering": "qa_outputs",
}


def save_adapter(
    model: GPTJPreTrainedModel,
    address: str | os.PathLike[str],
    *,
    base: Base,
    tokenizer: GPTJTokenizer | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder of a model's adapter; it is complete, or it is not there.

    Raises:
        ValueError: if the model has no adapter.
        AlreadyExistsError: if there is a finished checkpoint at the address.
    """
    if model.adapter is None:
        raise ValueError("the model has no adapter; remedy: save_pretrained")
    parameters = adapter_parameters(model)
    specs = [TensorSpec(name, tuple(p.shape), p.dtype) for name, p in parameters.items()]
    save_adapter_folder(
        address,
        config_of(model),
        model.adapter,
        specs,
        parameters.values(),
        base=base,
        tokenizer=tokenizer,
        training=training,
    )


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
) -> None:
    """As save_adapter, with tensors that come one at a time in the order of `specs`.

    Args:
        config: of the adapted model, with its class in `architectures`.
        specs: with the model's names.
    """
    fields = {
        **adapter.to_peft(),
        "task_type": TASK_TYPES.get((config.architectures or [""])[0]),
        "base_model_name_or_path": base.address,
        "revision": base.revision,
    }
    named = [replace(spec, name=PREFIX + spec.name) for spec in specs]
    with FolderWriter(address) as writer:
        write_file(writer, ADAPTER_FILE, named, iter(tensors))
        writer.write(BASE, _json(base.to_dict()))
        writer.write(ADAPTER_CONFIG, _json(fields))
        write_small_files(writer, config, tokenizer, training)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter that was read.

    Attributes:
        task_type: PEFT's, if it is known.
        tensors: by the model's names: A, B, and the heads that were trained.
    """

    address: str
    folder: str
    manifest: Manifest | None
    config: LoRAConfig
    task_type: str | None
    tensors: dict[str, Tensor]

    @property
    def base(self) -> Base:
        """CheckpointError if it is not known."""
        return Base.of(self.folder, self.manifest)

    @property
    def architecture(self) -> str | None:
        """The name of the adapted model's class, if a head or PEFT's task says so."""
        for cls, head in HEAD_OF.items():
            if head in self.config.modules_to_save:
                return cls
        return next((cls for cls, task in TASK_TYPES.items() if task == self.task_type), None)

    def model_config(self, base: GPTJConfig, overrides: Mapping[str, Any]) -> GPTJConfig:
        """The adapted model's: the folder's own, or else the base's with as many labels as `score`.

        CheckpointError if it is damaged.
        """
        if has_file(self.folder, CONFIG, self.manifest):
            return read_config(self.folder, self.manifest, overrides)
        fields = base.to_dict()
        if self.architecture is not None:
            fields["architectures"] = [self.architecture]
        score = self.tensors.get("score.weight")
        if score is not None and len(score) != base.num_labels:
            fields = {k: v for k, v in fields.items() if k not in ("id2label", "label2id")}
            fields["num_labels"] = len(score)
        return GPTJConfig.from_dict({**fields, **overrides})


def read_adapter(
    address: str | os.PathLike[str], *, revision: str | None = None, verify: bool = True
) -> StoredAdapter:
    """Read an adapter's folder: local, on S3 or of the hub.

    Raises:
        FileNotFoundError: if there is nothing at the address.
        CheckpointError: naming what is damaged, or what is not supported.
    """
    address = normalized(address)
    folder = locate(address, revision=revision, patterns=PATTERNS)
    manifest = Manifest.read(folder)
    if not is_adapter(folder, manifest):
        storage.list_files(folder)  # raises, if it is the bucket that is missing
        raise storage.NotFoundError(f"{address} is no adapter's folder: it has no {ADAPTER_CONFIG}")
    place = storage.join(folder, ADAPTER_CONFIG)
    fields = parse_object(read_verified(folder, ADAPTER_CONFIG, manifest), place)
    try:
        config = LoRAConfig.from_peft(fields)
    except ValueError as error:
        raise CheckpointError(f"{place}: {error}") from error
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_weights(folder, manifest, verify=verify, kinds=KINDS):
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name} of {address} has the dtype {tensor.dtype}, no weight's")
        tensors[name.removeprefix(PREFIX)] = tensor
    return StoredAdapter(address, folder, manifest, config, fields.get("task_type"), tensors)


def put_adapter(model: GPTJPreTrainedModel, adapter: StoredAdapter) -> None:
    """Put an adapter that was read into a model of its base, in the model's dtype.

    A head that the model does not have is left out.

    Raises:
        CheckpointError: naming what is missing, too much, or of another shape.
    """
    prefix = GPTJPreTrainedModel.base_model_prefix + "."
    kept = tuple(name for name in adapter.config.modules_to_save if hasattr(model, name))
    lost = tuple(f"{name}." for name in HEADS if name not in kept)
    with without_weights():  # nor random numbers for what is read
        try:
            add_lora(model, replace(adapter.config, modules_to_save=kept))
        except ValueError as error:
            raise CheckpointError(f"{adapter.address}: {error}") from error
    parameters = adapter_parameters(model)
    for stored, tensor in adapter.tensors.items():
        if stored.startswith(lost):
            continue
        name = stored.removeprefix(prefix) if model.base_model is model else stored
        parameter = parameters.pop(name, None)
        if parameter is None:
            raise CheckpointError(
                f"{adapter.address} has weights that no such adapter of this model has: {stored}"
            )
        if parameter.shape != tensor.shape:
            raise CheckpointError(
                f"{stored} of {adapter.address} has the shape {tuple(tensor.shape)}, and for this "
                f"base model it should have {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(tensor)
    if parameters:
        names = sorted(parameters)
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        raise CheckpointError(
            f"{adapter.address} is incomplete: {', '.join(names[:20])}{more} missing"
        )


def adapted_config(
    address: str, *, revision: str | None = None, overrides: Mapping[str, Any]
) -> GPTJConfig:
    """The configuration of an adapter's model, as load_config gives a model's."""
    folder = locate(address, revision=revision, patterns=PATTERNS)
    manifest = Manifest.read(folder)
    if has_file(folder, CONFIG, manifest):
        return read_config(folder, manifest, overrides)
    adapter = read_adapter(address, revision=revision)
    base = adapter.base
    return adapter.model_config(load_config(base.address, revision=base.revision), overrides)


def _json(fields: Mapping[str, Any]) -> bytes:
    return (to_json(fields, indent=2) + "\n").encode()
