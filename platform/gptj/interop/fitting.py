"""Check that tensors and a configuration make up a GPT-J."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from gptj.checkpoints.skeleton import without_weights
from gptj.checkpoints.weights import OLD_BUFFERS
from gptj.config import GPTJConfig
from gptj.errors import CheckpointError
from gptj.interop.tensors import StoredTensor
from gptj.model import (
    HEAD_CLASSES,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
)
from gptj.pretrained import GPTJPreTrainedModel
from gptj.pretrained.weight_loading import UNTIED

PREFIX = GPTJPreTrainedModel.base_model_prefix + "."
HEADS: dict[str, type[GPTJPreTrainedModel]] = {
    "lm_head.": GPTJForCausalLM,
    "score.": GPTJForSequenceClassification,
    "qa_outputs.": GPTJForQuestionAnswering,
}

logger = logging.getLogger(__name__)

_NAMED = 8  # most problems named in a message


def fit(
    tensors: Sequence[StoredTensor], config: GPTJConfig, source: str
) -> tuple[GPTJConfig, list[StoredTensor]]:
    """The tensors in the model's order and under its names; sets the class in `architectures`.

    The heads present determine the class. The causal masks of old checkpoints are dropped.

    Raises:
        CheckpointError: naming what is missing, unexpected, or of the wrong shape or dtype.
    """
    stored: dict[str, StoredTensor] = {}
    for tensor in tensors:
        if tensor.name.endswith(OLD_BUFFERS):
            continue
        name = tensor.name.removeprefix(PREFIX)
        if name in stored:
            raise CheckpointError(f"{source} has {tensor.name} twice")
        stored[name] = tensor
    cls = _class_of(stored, config, source)
    config = _tied_or_not(stored, config, cls, source)
    if config.n_layer > len(stored):  # before building a model of a million layers
        raise CheckpointError(
            f"{source} has {len(stored)} tensors, too few for the {config.n_layer} layers of its "
            f"configuration"
        )
    fitted = GPTJConfig.from_dict(config.to_dict())
    fitted.architectures = [cls.__name__]
    if cls is GPTJForQuestionAnswering and fitted.num_labels != 2:
        fitted.num_labels = 2  # start and end
    with without_weights():
        model = cls(fitted)
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    shared = set(dict(model.named_parameters(remove_duplicate=False))) - set(expected)
    found = {name: stored.pop(name.removeprefix(PREFIX), None) for name in expected}
    for name in shared:  # the second name of one tensor
        stored.pop(name, None)

    problems = [
        *(f"{name} is missing" for name, tensor in found.items() if tensor is None),
        *(f"{tensor.name} is not part of a {cls.__name__}" for tensor in stored.values()),
        *(
            f"{name} has the shape {tensor.shape}, but the configuration's is {expected[name]}"
            for name, tensor in found.items()
            if tensor is not None and tensor.shape != expected[name]
        ),
        *(
            f"{name} has the dtype {tensor.dtype}, which is not floating point"
            for name, tensor in found.items()
            if tensor is not None and not tensor.dtype.is_floating_point
        ),
    ]
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise CheckpointError(
            f"{source} does not match the {cls.__name__} of its configuration: "
            + "; ".join(problems[:_NAMED])
            + more
        )
    return fitted, [tensor.renamed(name) for name, tensor in found.items() if tensor is not None]


def _tied_or_not(
    stored: dict[str, StoredTensor],
    config: GPTJConfig,
    cls: type[GPTJPreTrainedModel],
    source: str,
) -> GPTJConfig:
    """The configuration, with tie_word_embeddings unset if the head differs from the embedding.

    If only the head is stored, it is also used as the embedding.
    """
    head, embedding = stored.get("lm_head.weight"), stored.get("wte.weight")
    if cls is not GPTJForCausalLM or not config.tie_word_embeddings or head is None:
        return config
    if embedding is None:
        stored["wte.weight"] = head.renamed("transformer.wte.weight")
        return config
    dtype = torch.promote_types(head.dtype, embedding.dtype)
    if torch.equal(head.load(dtype), embedding.load(dtype)):
        return config
    logger.warning(UNTIED, source)
    return GPTJConfig.from_dict({**config.to_dict(), "tie_word_embeddings": False})


def _class_of(
    names: dict[str, StoredTensor], config: GPTJConfig, source: str
) -> type[GPTJPreTrainedModel]:
    declared = HEAD_CLASSES.get((config.architectures or [""])[0])
    heads = [cls for prefix, cls in HEADS.items() if any(name.startswith(prefix) for name in names)]
    if declared in heads or (declared is not None and not heads):
        return declared
    if len(heads) > 1:
        raise CheckpointError(
            f"{source} has several heads ({', '.join(cls.__name__ for cls in heads)}), but its "
            f"configuration's architectures={config.architectures} names none of them"
        )
    return heads[0] if heads else GPTJModel
