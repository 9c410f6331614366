"""A task's parts: its data set, its model's head and new configuration; settings in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from gptj import storage
from gptj.checkpoints.manifest import FolderWriter, Manifest
from gptj.config import PRESETS, GPTJConfig
from gptj.data.causal_lm import CausalLMData
from gptj.data.classification import ClassificationData, LabelSet
from gptj.data.question_answering import QuestionAnsweringData
from gptj.data.rows import Row
from gptj.data.sources import read_rows
from gptj.errors import NoTokenizerError
from gptj.model import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification
from gptj.pretrained import GPTJPreTrainedModel
from gptj.tokenizer import GPTJTokenizer
from gptj.training.fingerprint import CountedRows, Fingerprint
from gptj.training.settings import COLUMNS, Settings, SettingsError, Task
from gptj.training.state import latest_checkpoint

Data = CausalLMData | ClassificationData | QuestionAnsweringData

HEADS: dict[Task, type[GPTJPreTrainedModel]] = {
    "causal-lm": GPTJForCausalLM,
    "classification": GPTJForSequenceClassification,
    "question-answering": GPTJForQuestionAnswering,
}


class TaskData(NamedTuple):
    """What a run learns from and is measured on."""

    train: Data
    evaluation: Data | None
    fingerprints: dict[str, Fingerprint]  # of "train" and "evaluation"


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
        # All columns of the task: what is missing is said at once.
        rows = _rows(settings, settings.train_data, COLUMNS[settings.task])
        texts = (row.text(column) for row in rows for column in columns)
        tokenizer = GPTJTokenizer.train(texts, settings.tokenizer.vocab_size)
        tokenizer.model_max_length = config_fields(settings)["n_positions"]
        with FolderWriter(folder) as writer:
            for name, content in tokenizer.files().items():
                writer.write(name, content)
    return load_tokenizer(settings)


def load_tokenizer(settings: Settings) -> GPTJTokenizer:
    """The tokenizer that `prepare_tokenizer` has made sure of.

    One without a padding token, such as the published one, pads with eos: what is exported is used
    in batches.
    """
    tokenizer = _stored_tokenizer(settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _stored_tokenizer(settings: Settings) -> GPTJTokenizer:
    checkpoint, address = settings.model.checkpoint, settings.tokenizer.address
    if checkpoint:
        try:
            own = GPTJTokenizer.from_pretrained(
                checkpoint, revision=settings.model.revision or None
            )
        except NoTokenizerError as error:
            if not address:
                raise SettingsError(f"{error}; remedy: tokenizer.address=") from error
        else:
            if address:
                raise SettingsError(
                    f"tokenizer.address={address} beside model.checkpoint={checkpoint}, which has "
                    f"a tokenizer of its own: leave it out"
                )
            return own
    return GPTJTokenizer.from_pretrained(address or storage.join(settings.folder, "tokenizer"))


def make_data(settings: Settings, tokenizer: GPTJTokenizer) -> TaskData:
    """Read the training and the evaluation data.

    A classifier that is trained further keeps its labels.

    Raises:
        DataError: naming what cannot be read.
        SettingsError: if the settings contradict a classifier's labels.
    """
    labels = _trained_labels(settings) if settings.task == "classification" else None
    if labels is not None:
        labels = _as_set(settings, labels)
    train, fingerprint = _data(settings, settings.train_data, tokenizer, labels)
    fingerprints = {"train": fingerprint}
    if settings.evaluation_data is None:
        return TaskData(train, None, fingerprints)
    if isinstance(train, ClassificationData):
        labels = train.labels
    evaluation, fingerprint = _data(settings, settings.evaluation_data, tokenizer, labels)
    fingerprints["evaluation"] = fingerprint
    return TaskData(train, evaluation, fingerprints)


def make_config(settings: Settings, tokenizer: GPTJTokenizer, data: Data) -> GPTJConfig:
    """The configuration of the run's model.

    Raises:
        SettingsError: if the model has too few positions or vocabulary entries for the data, or is
            a checkpoint of another shape.
    """
    labels: dict[str, Any] = {}
    if isinstance(data, ClassificationData):
        labels = {
            "id2label": data.labels.id2label,
            "problem_type": data.labels.problem_type,
        }
    checkpoint = settings.model.checkpoint
    if checkpoint:
        revision = settings.model.revision or None
        _check_shape(settings, GPTJConfig.from_pretrained(checkpoint, revision=revision))
        config = GPTJConfig.from_pretrained(
            checkpoint, revision=revision, **{**settings.model.config, **labels}
        )
        if "pad_token_id" not in settings.model.config and tokenizer.pad_token_id is not None:
            config.pad_token_id = tokenizer.pad_token_id  # it pads what the model is given
    else:
        tokens = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = GPTJConfig(**{**tokens, **config_fields(settings), **labels})
    if config.vocab_size < len(tokenizer):
        raise SettingsError(
            f"the model has vocab_size={config.vocab_size} and the tokenizer {len(tokenizer)} "
            f"entries: "
            + (
                f"{settings.tokenizer.address or checkpoint} is not the tokenizer of {checkpoint}"
                if checkpoint
                else "raise model.config.vocab_size"
            )
        )
    if config.n_positions < settings.data.sequence_length:
        raise SettingsError(
            f"data.sequence_length={settings.data.sequence_length} is beyond the model's "
            f"n_positions={config.n_positions}: lower it, or raise model.config.n_positions"
        )
    return config


# What a checkpoint's weights are made for.
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
                f"{settings.model.checkpoint} has {name}={found!r}, which its weights are made "
                f"for: leave it out"
            )


def _trained_labels(settings: Settings) -> LabelSet | None:
    """What the run's checkpoint tells apart, if it is a classifier."""
    if not settings.model.checkpoint:
        return None
    config = GPTJConfig.from_pretrained(
        settings.model.checkpoint, revision=settings.model.revision or None
    )
    is_classifier = GPTJForSequenceClassification.__name__ in (config.architectures or ())
    return LabelSet.of(config) if is_classifier else None


def _as_set(settings: Settings, trained: LabelSet) -> LabelSet:
    """A checkpoint's labels with what the settings say of them; its head stays as it is.

    Only class numbers without names (LABEL_0, …) may get names.
    """
    checkpoint, data = settings.model.checkpoint, settings.data
    if data.problem_type not in (None, trained.problem_type):
        raise SettingsError(
            f"data.problem_type={data.problem_type}, but {checkpoint} is trained for "
            f"{trained.problem_type}: leave it out"
        )
    if not data.label_names:
        return trained
    written = data.label_names
    names = tuple(dict.fromkeys(written.values()) if isinstance(written, dict) else written)
    known, given = ", ".join(trained.names), ", ".join(names)
    if trained.is_nameless and len(names) == len(trained.names):
        trained = replace(trained, names=names)
    if set(names) != set(trained.names):
        raise SettingsError(
            f"{checkpoint} tells {len(trained.names)} labels apart ({known:.300}), and "
            f"data.label_names has {len(names)} ({given:.300}): leave it out, or begin with a "
            f"checkpoint that is no classifier"
        )
    if isinstance(written, dict):
        return trained.translated(written)
    if names != trained.names:
        raise SettingsError(
            f"data.label_names is in another order ({given:.300}) than the outputs of "
            f"{checkpoint} ({known:.300}): leave it out, or give them in that order"
        )
    return trained


def config_fields(settings: Settings) -> dict[str, Any]:
    """A new model's configuration, as far as the settings say."""
    return {"n_positions": 2048, **PRESETS[settings.model.preset], **settings.model.config}


def _data(
    settings: Settings, address: str, tokenizer: GPTJTokenizer, labels: LabelSet | None
) -> tuple[Data, Fingerprint]:
    columns = COLUMNS[settings.task]
    rows = CountedRows(_rows(settings, address, columns), columns)
    length = settings.data.sequence_length
    data: Data
    if settings.task == "causal-lm":
        data = CausalLMData(rows, tokenizer, length)
    elif settings.task == "question-answering":
        data = QuestionAnsweringData(rows, tokenizer, length, settings.data.stride)
    elif labels is not None:
        data = ClassificationData(rows, tokenizer, length, labels)
    else:
        data = ClassificationData(
            rows,
            tokenizer,
            length,
            label_names=settings.data.label_names or None,
            problem_type=settings.data.problem_type,
        )
    return data, rows.fingerprint


def _rows(settings: Settings, address: str, columns: Sequence[str]) -> Iterator[Row]:
    data = settings.data
    return read_rows(address, columns, data.columns, delimiter=data.delimiter)
