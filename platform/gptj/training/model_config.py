"""The configuration of a run's model: settings, a tokenizer and labels in."""

from __future__ import annotations

from typing import Any

from gptj.adapters.base import check_plain
from gptj.checkpoints.folder import ADAPTER_FILES, CONFIG, GENERATION_CONFIG, ModelFolder
from gptj.config import PRESETS, GPTJConfig
from gptj.data.labels import LabelSet
from gptj.errors import CheckpointError
from gptj.layers.int4 import is_quantized
from gptj.tokenizer import GPTJTokenizer
from gptj.training.settings import Settings, SettingsError


def make_config(
    settings: Settings, tokenizer: GPTJTokenizer, labels: LabelSet | None = None
) -> GPTJConfig:
    """The configuration of the run's model.

    Args:
        labels: a classifier's labels.

    Raises:
        SettingsError: if the model has too few positions or vocabulary entries for the data, or
            the settings contradict the checkpoint's shape.
    """
    head: dict[str, Any] = {}
    if labels is not None:
        head = {"id2label": labels.id2label, "problem_type": labels.problem_type}
    checkpoint = settings.model.checkpoint
    if checkpoint:
        revision = settings.model.revision or None
        check_plain(checkpoint, revision)
        files = [CONFIG, GENERATION_CONFIG, *ADAPTER_FILES]
        with ModelFolder.open(checkpoint, revision=revision, files=files) as folder:
            stored = GPTJConfig.from_folder(folder)
            _check_shape(settings, stored)
            if is_quantized(stored):
                raise SettingsError(
                    f"model.checkpoint={checkpoint} has 4-bit weights, which cannot be trained; "
                    f"remedy: the model that they were made from, perhaps with adapter.quantization"
                )
            model = settings.task_definition.head
            config = model.config_of(folder, **{**settings.model.config, **head})
        if "pad_token_id" not in settings.model.config and tokenizer.pad_token_id is not None:
            config.pad_token_id = tokenizer.pad_token_id  # the tokenizer pads the inputs
    else:
        tokens = {
            "vocab_size": tokenizer.rows_needed,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = GPTJConfig(**{**tokens, **new_config(settings), **head})
    try:
        tokenizer.check_rows(config.vocab_size, checkpoint or "model.config")
    except CheckpointError as error:
        remedy = "raise model.config.vocab_size"
        if checkpoint:
            remedy = (
                f"{settings.tokenizer.address or checkpoint} is not the tokenizer of {checkpoint}"
            )
        raise SettingsError(f"{error}; {remedy}") from error
    if config.n_positions < settings.data.sequence_length:
        raise SettingsError(
            f"data.sequence_length={settings.data.sequence_length} is beyond the model's "
            f"n_positions={config.n_positions}: lower it, or raise model.config.n_positions"
        )
    return config


# Fields that a checkpoint's weights depend on.
_SHAPE = (
    "vocab_size",
    "n_embd",
    "n_layer",
    "n_head",
    "rotary_dim",
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
    "tie_word_embeddings",
)


def _check_shape(settings: Settings, config: GPTJConfig) -> None:
    for name in _SHAPE:
        found = getattr(config, name)
        as_number = {"n_inner": config.inner_dim, "rotary_dim": config.rotated_dim}.get(name)
        if settings.model.config.get(name, found) not in (found, as_number):
            raise SettingsError(
                f"model.config.{name}={settings.model.config[name]!r}, but "
                f"the weights of {settings.model.checkpoint} require {name}={found!r}: leave it "
                f"out"
            )


def new_config(settings: Settings) -> dict[str, Any]:
    """A new model's configuration, as far as the settings give it."""
    return {"n_positions": 2048, **PRESETS[settings.model.preset], **settings.model.config}
