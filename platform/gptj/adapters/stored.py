"""Read an adapter's folder, and load it into its base model.

It has PEFT's `adapter_config.json` and `adapter_model.safetensors`; our folders
(gptj.pretrained.saving) also have `base.json`, the adapted model's `config.json`, the tokenizer and
`training.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gptj import storage
from gptj.adapters.base import Base
from gptj.adapters.config import HEADS, LoRAConfig
from gptj.adapters.lora import adapter_parameters, add_lora
from gptj.adapters.model import AdaptableModel
from gptj.checkpoints.folder import ADAPTER_CONFIG, CONFIG, ModelFolder
from gptj.checkpoints.skeleton import without_weights
from gptj.errors import CheckpointError

ADAPTER_FILE = "adapter_model.safetensors"
KINDS = (
    (ADAPTER_FILE, "adapter_model.safetensors.index.json"),
    ("adapter_model.bin", "adapter_model.bin.index.json"),
)
PREFIX = "base_model.model."  # of PEFT's names; the rest equals ours
TASK_TYPES = {  # PEFT's, by our class names
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
    """An adapter read from its folder.

    Attributes:
        task_type: PEFT's, if known.
        tensors: A, B and the trained heads, by the model's names.
        known_base: None if a PEFT folder does not name it.
    """

    address: str
    config: LoRAConfig
    task_type: str | None
    tensors: dict[str, Tensor]
    known_base: Base | None

    @property
    def architecture(self) -> str | None:
        """The adapted model's class name, if a head or PEFT's task type reveals it."""
        for cls, head in HEAD_OF.items():
            if head in self.config.modules_to_save:
                return cls
        return next((cls for cls, task in TASK_TYPES.items() if task == self.task_type), None)

    def adapted_fields(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The adapted model's configuration: the base's, with `score`'s number of labels."""
        fields = dict(base)
        if self.architecture is not None:
            fields["architectures"] = [self.architecture]
        score = self.tensors.get("score.weight")
        if score is not None and len(score) != len(fields.get("id2label") or (0, 1)):
            fields = {k: v for k, v in fields.items() if k not in ("id2label", "label2id")}
            fields["num_labels"] = len(score)
        return fields


def read_adapter(folder: ModelFolder) -> StoredAdapter:
    """Read an adapter's settings and tensors, which may be views of its files.

    Raises:
        FileNotFoundError: if it is not an adapter folder.
        CheckpointError: naming what is damaged or not supported.
    """
    config, task_type = read_config(folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in folder.read_weights(KINDS):
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{name} of {folder.address} has the dtype {tensor.dtype}, which is not "
                f"floating point"
            )
        tensors[name.removeprefix(PREFIX)] = tensor
    base = Base.of(folder) if Base.named_in(folder) else None
    return StoredAdapter(folder.address, config, task_type, tensors, base)


def read_config(folder: ModelFolder) -> tuple[LoRAConfig, str | None]:
    """An adapter's settings, and PEFT's task type if known. Raises what `read_adapter` does."""
    if not folder.is_adapter:
        raise storage.NotFoundError(
            f"{folder.address} is not an adapter folder: it has no {ADAPTER_CONFIG}"
        )
    fields = folder.read_object(ADAPTER_CONFIG)
    try:
        return LoRAConfig.from_peft(fields), fields.get("task_type")
    except ValueError as error:
        place = storage.join(folder.address, ADAPTER_CONFIG)
        raise CheckpointError(f"{place}: {error}") from error


def read_adapted_config(folder: ModelFolder, base: ModelFolder | None = None) -> dict[str, Any]:
    """The adapted model's configuration fields: the folder's own, or derived from its base's.

    Raises what read_adapter does, and FileNotFoundError if there is no base.
    """
    if CONFIG in folder:
        return folder.read_config()
    if base is not None:
        return read_adapter(folder).adapted_fields(base.read_config())
    with Base.of(folder).open(folder.address, files=[CONFIG]) as found:
        return read_adapter(folder).adapted_fields(found.read_config())


def put_adapter(model: AdaptableModel, adapter: StoredAdapter) -> None:
    """Load an adapter into a model of its base, in the model's dtype.

    Heads that the model does not have are skipped.

    Raises:
        CheckpointError: naming what is missing, unexpected or of the wrong shape.
    """
    prefix = f"{model.base_model_prefix}."
    kept = tuple(name for name in adapter.config.modules_to_save if hasattr(model, name))
    lost = tuple(f"{name}." for name in HEADS if name not in kept)
    with without_weights():  # no initialisation, since the weights are loaded
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
                f"{adapter.address} has a weight that this model's adapter lacks: {stored}"
            )
        if parameter.shape != tensor.shape:
            raise CheckpointError(
                f"{stored} of {adapter.address} has the shape {tuple(tensor.shape)}, but this base "
                f"model needs {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(tensor)
    if parameters:
        names = sorted(parameters)
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        raise CheckpointError(
            f"{adapter.address} is incomplete: {', '.join(names[:20])}{more} missing"
        )
