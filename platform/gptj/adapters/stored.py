"""An adapter's folder, read: put into a model of its base, or merged with it.

PEFT's `adapter_config.json` and `adapter_model.safetensors`; folders of ours (gptj.saving) have
`base.json`, the adapted model's `config.json`, the tokenizer and `training.json` too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptj import storage
from gptj.adapters.base import Base
from gptj.adapters.config import HEADS, LoRAConfig
from gptj.adapters.lora import adapter_parameters, add_lora
from gptj.checkpoints.folder import ADAPTER_CONFIG, CONFIG, ModelFolder
from gptj.checkpoints.skeleton import without_weights
from gptj.errors import CheckpointError

if TYPE_CHECKING:
    from gptj.pretrained import GPTJPreTrainedModel

ADAPTER_FILE = "adapter_model.safetensors"
KINDS = (
    (ADAPTER_FILE, "adapter_model.safetensors.index.json"),
    ("adapter_model.bin", "adapter_model.bin.index.json"),
)
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


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter that was read.

    Attributes:
        task_type: PEFT's, if it is known.
        tensors: by the model's names: A, B, and the heads that were trained.
        known_base: None if PEFT's folder does not name it.
    """

    address: str
    config: LoRAConfig
    task_type: str | None
    tensors: dict[str, Tensor]
    known_base: Base | None

    @property
    def architecture(self) -> str | None:
        """The name of the adapted model's class, if a head or PEFT's task says so."""
        for cls, head in HEAD_OF.items():
            if head in self.config.modules_to_save:
                return cls
        return next((cls for cls, task in TASK_TYPES.items() if task == self.task_type), None)

    def adapted_fields(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The adapted model's configuration: the base's, with as many labels as `score` has."""
        fields = dict(base)
        if self.architecture is not None:
            fields["architectures"] = [self.architecture]
        score = self.tensors.get("score.weight")
        if score is not None and len(score) != len(fields.get("id2label") or (0, 1)):
            fields = {k: v for k, v in fields.items() if k not in ("id2label", "label2id")}
            fields["num_labels"] = len(score)
        return fields


def read_adapter(folder: ModelFolder) -> StoredAdapter:
    """Read an adapter's folder: its settings and its tensors, which may be views of its files.

    Raises:
        FileNotFoundError: if it is not an adapter folder.
        CheckpointError: naming what is damaged, or what is not supported.
    """
    if not folder.is_adapter:
        raise storage.NotFoundError(
            f"{folder.address} is not an adapter folder: it has no {ADAPTER_CONFIG}"
        )
    fields = folder.read_object(ADAPTER_CONFIG)
    try:
        config = LoRAConfig.from_peft(fields)
    except ValueError as error:
        place = storage.join(folder.address, ADAPTER_CONFIG)
        raise CheckpointError(f"{place}: {error}") from error
    tensors: dict[str, Tensor] = {}
    for name, tensor in folder.read_weights(KINDS):
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{name} of {folder.address} has the dtype {tensor.dtype}, no weight's"
            )
        tensors[name.removeprefix(PREFIX)] = tensor
    base = Base.of(folder) if Base.named_in(folder) else None
    return StoredAdapter(folder.address, config, fields.get("task_type"), tensors, base)


def read_adapted_config(folder: ModelFolder, base: ModelFolder | None = None) -> dict[str, Any]:
    """The fields of the adapted model's configuration: the folder's own, or by its base's.

    Raises what read_adapter does, and FileNotFoundError if there is no base.
    """
    if CONFIG in folder:
        return folder.read_config()
    if base is not None:
        return read_adapter(folder).adapted_fields(base.read_config())
    named = Base.of(folder)
    with ModelFolder.open(named.address, revision=named.revision, files=[CONFIG]) as found:
        return read_adapter(folder).adapted_fields(found.read_config())


def put_adapter(model: GPTJPreTrainedModel, adapter: StoredAdapter) -> None:
    """Put an adapter that was read into a model of its base, in the model's dtype.

    A head that the model does not have is left out.

    Raises:
        CheckpointError: naming what is missing, too much, or of another shape.
    """
    prefix = f"{model.base_model_prefix}."
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
