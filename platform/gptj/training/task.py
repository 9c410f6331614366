"""A task's parts: its data set, its model's head and new configuration; settings in."""

from __future__ import annotations

from typing import Any

from gptj import storage
from gptj.config import PRESETS, GPTJConfig
from gptj.data.causal_lm import CausalLMData
from gptj.data.classification import ClassificationData, LabelSet
from gptj.data.question_answering import QuestionAnsweringData
from gptj.data.sources import read_rows
from gptj.manifest import FolderWriter, Manifest
from gptj.model import (
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJPreTrainedModel,
)
from gptj.tokenizer import GPTJTokenizer
from gptj.training.settings import Settings, SettingsError, Task
from gptj.training.state import latest_checkpoint

Data = CausalLMData | ClassificationData | QuestionAnsweringData

HEADS: dict[Task, type[GPTJPreTrainedModel]] = {
    "causal-lm": GPTJForCausalLM,
    "classification": GPTJForSequenceClassification,
    "question-answering": GPTJForQuestionAnswering,
}


def prepare_tokenizer(settings: Settings) -> GPTJTokenizer:
    """The run's tokenizer; one that has to be learned is kept in the run's folder.

    It is learned anew as long as the run has no checkpoint, which would depend on it.

    Raises:
        storage.StorageError, gptj.data.sources.DataError: if the training data cannot be read.
    """
    address = settings.model.checkpoint or settings.tokenizer.address
    if address:
        return load_tokenizer(settings)
    folder = storage.join(settings.folder, "tokenizer")
    if latest_checkpoint(settings.folder) is None:
        storage.delete_folder(folder)  # of a try that ended before its first checkpoint
    if Manifest.read(folder) is None:
        columns = ("question", "context") if settings.task == "question-answering" else ("text",)
        rows = read_rows(settings.train_data, settings.data.columns)
        texts = (row.text(column) for row in rows for column in columns)
        tokenizer = GPTJTokenizer.train(texts, settings.tokenizer.vocab_size)
        tokenizer.model_max_length = config_fields(settings)["n_positions"]
        with FolderWriter(folder) as writer:
            for name, content in tokenizer.files().items():
                writer.write(name, content)
    return load_tokenizer(settings)


def load_tokenizer(settings: Settings) -> GPTJTokenizer:
    """The tokenizer that `prepare_tokenizer` has made sure of."""
    address = settings.model.checkpoint or settings.tokenizer.address
    if address:
        return GPTJTokenizer.from_pretrained(address, revision=settings.model.revision or None)
    return GPTJTokenizer.from_pretrained(storage.join(settings.folder, "tokenizer"))


def make_data(settings: Settings, tokenizer: GPTJTokenizer) -> tuple[Data, Data | None]:
    """The training and the evaluation data set.

    A classifier that is trained further keeps its labels, unless data.label_names has others.
    """
    labels = None
    if settings.task == "classification" and not settings.data.label_names:
        labels = _trained_labels(settings)
    train = _data(settings, settings.train_data, tokenizer, labels)
    if settings.evaluation_data is None:
        return train, None
    if isinstance(train, ClassificationData):
        labels = train.labels
    return train, _data(settings, settings.evaluation_data, tokenizer, labels)


def make_config(settings: Settings, tokenizer: GPTJTokenizer, data: Data) -> GPTJConfig:
    """The configuration of the run's model.

    Raises:
        SettingsError: if the model has too few positions or vocabulary entries for the data.
    """
    labels: dict[str, Any] = {}
    if isinstance(data, ClassificationData):
        labels = {
            "id2label": data.labels.id2label,
            "problem_type": data.labels.problem_type,
        }
    if settings.model.checkpoint:
        config = GPTJConfig.from_pretrained(
            settings.model.checkpoint,
            revision=settings.model.revision or None,
            **{**settings.model.config, **labels},
        )
    else:
        tokens = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = GPTJConfig(**{**tokens, **config_fields(settings), **labels})
    trained = _trained_labels(settings) if settings.task == "classification" else None
    if trained is not None and len(trained.names) != config.num_labels:
        raise SettingsError(
            f"{settings.model.checkpoint} tells {len(trained.names)} labels apart "
            f"({', '.join(trained.names)}), data.label_names has {config.num_labels}"
        )
    if config.vocab_size < len(tokenizer):
        raise SettingsError(
            f"the model has vocab_size={config.vocab_size} and the tokenizer {len(tokenizer)} "
            f"entries: raise model.config.vocab_size"
        )
    if config.n_positions < settings.data.sequence_length:
        raise SettingsError(
            f"data.sequence_length={settings.data.sequence_length} is beyond the model's "
            f"n_positions={config.n_positions}: lower it, or raise model.config.n_positions"
        )
    return config


def _trained_labels(settings: Settings) -> LabelSet | None:
    """What the run's checkpoint tells apart, if it is a classifier."""
    if not settings.model.checkpoint:
        return None
    config = GPTJConfig.from_pretrained(
        settings.model.checkpoint, revision=settings.model.revision or None
    )
    is_classifier = GPTJForSequenceClassification.__name__ in (config.architectures or ())
    return LabelSet.of(config) if is_classifier else None


def config_fields(settings: Settings) -> dict[str, Any]:
    """A new model's configuration, as far as the settings say."""
    return {"n_positions": 2048, **PRESETS[settings.model.preset], **settings.model.config}


def _data(
    settings: Settings, address: str, tokenizer: GPTJTokenizer, labels: LabelSet | None
) -> Data:
    rows = read_rows(address, settings.data.columns)
    length = settings.data.sequence_length
    if settings.task == "causal-lm":
        return CausalLMData(rows, tokenizer, length)
    if settings.task == "question-answering":
        return QuestionAnsweringData(rows, tokenizer, length, settings.data.stride)
    if labels is not None:
        return ClassificationData(rows, tokenizer, length, labels)
    return ClassificationData(
        rows,
        tokenizer,
        length,
        label_names=settings.data.label_names or None,
        problem_type=settings.data.problem_type,
    )
