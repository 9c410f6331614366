"""Classification of texts (one label or several each) and regression."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gptj.config import GPTJConfig
from gptj.data.classification import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    ClassificationData,
    read_all_labels,
)
from gptj.data.labels import LabelSet
from gptj.data.prepared import Prepared
from gptj.data.rows import Row
from gptj.model import GPTJForSequenceClassification
from gptj.tokenizer import GPTJTokenizer
from gptj.training.sections import DataSettings, SettingsError
from gptj.training.tasks.base import Part, Task, check_all_there

Array = np.ndarray[Any, Any]


class Classification(Task[ClassificationData]):
    name = "classification"
    head = GPTJForSequenceClassification
    text_columns = ("text", "text_pair")
    sample = "sample://reviews"
    best_by = ("f1", "mse")
    own_settings = ("problem_type", "label_names")

    def read(
        self,
        rows: Iterable[Row],
        tokenizer: GPTJTokenizer,
        options: DataSettings,
        labels: LabelSet | None = None,
    ) -> ClassificationData:
        if labels is not None:
            return ClassificationData(rows, tokenizer, options.sequence_length, labels)
        return ClassificationData(
            rows,
            tokenizer,
            options.sequence_length,
            label_names=options.label_names or None,
            problem_type=options.problem_type,
        )

    def write(
        self,
        folder: Path,
        prepared: Prepared,
        tokenizer: GPTJTokenizer,
        options: DataSettings,
        labels: LabelSet | None = None,
    ) -> None:
        length, names = options.sequence_length, options.label_names or prepared.label_names
        if labels is not None:
            if labels.written is None and isinstance(prepared.label_names, Mapping):
                labels = labels.translated(prepared.label_names)
            ClassificationData.write(folder, prepared, tokenizer, length, labels)
            return
        ClassificationData.write(
            folder,
            prepared,
            tokenizer,
            length,
            label_names=names,
            problem_type=options.problem_type or prepared.problem_type,
        )

    def labels_in(
        self, parts: Sequence[Prepared], options: DataSettings, labels: LabelSet | None = None
    ) -> LabelSet:
        if labels is not None:
            return read_all_labels(parts, labels).labels
        names = options.label_names or None
        return read_all_labels(parts, None, names, options.problem_type).labels

    def load(self, folder: Path) -> ClassificationData:
        return ClassificationData.load(folder)

    def outputs(self, data: ClassificationData, output: Any, examples: Sequence[int]) -> list[Any]:
        logits: list[list[float]] = output.logits.float().cpu().tolist()
        return logits

    def metrics(self, data: ClassificationData, whole: Part) -> dict[str, float]:
        """`loss`, and depending on the problem type:

        single-label: `accuracy`, `f1` (macro, over the classes that occur);
        multi-label: `accuracy` (of whole rows), `f1` (micro);
        regression: `mse`, and `pearson` (mean over outputs) unless a side is constant.
        """
        check_all_there(data, whole)
        logits = np.array([whole.outputs[index] for index in range(len(data))])
        numbers = _classified(logits, data.targets, data.labels.problem_type)
        return {"loss": whole.loss / whole.items, **numbers}

    def labels_of(
        self, config: GPTJConfig, record: Mapping[str, Any] | None = None
    ) -> LabelSet | None:
        is_classifier = self.head.__name__ in (config.architectures or ())
        return LabelSet.of(config, record) if is_classifier else None

    def known_labels(
        self,
        config: GPTJConfig,
        checkpoint: str,
        options: DataSettings,
        record: Mapping[str, Any] | None = None,
    ) -> LabelSet | None:
        trained = self.labels_of(config, record)
        return None if trained is None else _renamed(trained, checkpoint, options)


def _renamed(trained: LabelSet, checkpoint: str, options: DataSettings) -> LabelSet:
    """A checkpoint's labels, named as in the settings; its head is unchanged.

    Only generic labels (LABEL_0, …) may be renamed.
    """
    if options.problem_type not in (None, trained.problem_type):
        raise SettingsError(
            f"data.problem_type={options.problem_type}, but {checkpoint} is trained for "
            f"{trained.problem_type}: leave it out"
        )
    if not options.label_names:
        return trained
    written = options.label_names
    names = tuple(dict.fromkeys(written.values()) if isinstance(written, dict) else written)
    known, given = ", ".join(trained.names), ", ".join(names)
    is_new = set(names) != set(trained.names)  # LABEL_0 … may be what the values stand for
    if is_new and trained.is_nameless and len(names) == len(trained.names):
        if isinstance(written, dict):
            names = _by_output(trained, checkpoint, written)
        trained = replace(trained, names=names)
    if set(names) != set(trained.names):
        raise SettingsError(
            f"{checkpoint} has {len(trained.names)} labels ({known:.300}), but "
            f"data.label_names has {len(names)} ({given:.300}): leave it out, or start from a "
            f"checkpoint that is not a classifier"
        )
    if isinstance(written, dict):
        return trained.translated(written)
    if names != trained.names:
        raise SettingsError(
            f"data.label_names ({given:.300}) is ordered differently from the outputs of "
            f"{checkpoint} ({known:.300}): leave it out, or use that order"
        )
    return trained


def _by_output(trained: LabelSet, checkpoint: str, written: Mapping[str, str]) -> tuple[str, ...]:
    """A mapping's names in the order of the outputs that its keys stand for.

    The keys are values of the data of the model's training, if that is known, or the outputs' own
    numbers or names. If they are none of these, their order is that of the outputs.
    """
    own = {str(number): number for number in trained.id2label}
    own |= {name: number for number, name in trained.id2label.items()}
    table = own if trained.trained is None else trained.trained
    known = {key: table[key] for key in written if key in table}
    names = tuple(dict.fromkeys(written.values()))
    # Numbers that only partly are an output's may count from 1.
    if not known or (trained.trained is None and len(known) < len(written)):
        return names
    outputs = {name: {known[key] for key in known if written[key] == name} for name in names}
    if sorted(outputs.values(), key=sorted) != [{number} for number in trained.id2label]:
        pairs = ", ".join(f"{key}: {number}" for key, number in table.items())
        raise SettingsError(
            f"data.label_names={written} does not name each output of {checkpoint} once: their "
            f"numbers are {pairs:.300}; remedy: a name for each of these values, or a list of the "
            f"names in the order of the outputs"
        )
    return tuple(sorted(names, key=lambda name: min(outputs[name])))


def _classified(logits_BC: Array, targets: Array, problem_type: str) -> dict[str, float]:
    if problem_type == REGRESSION:
        return _regressed(logits_BC, targets.reshape(logits_BC.shape))
    if problem_type == MULTI_LABEL:
        decisions, truth = logits_BC > 0, targets > 0.5  # a probability above one half
        whole_rows = (decisions == truth).all(axis=1)
        f1 = _f1(decisions & truth, decisions, truth)
        return {"accuracy": float(whole_rows.mean()), "f1": f1}
    assert problem_type == SINGLE_LABEL
    predictions = logits_BC.argmax(axis=1)
    occurring = np.union1d(predictions, targets)
    scores = [
        _f1((predictions == c) & (targets == c), predictions == c, targets == c) for c in occurring
    ]
    return {
        "accuracy": float((predictions == targets).mean()),
        "f1": float(np.mean(scores)),
    }


def _f1(hits: Array, predicted: Array, true: Array) -> float:
    """2 * hits / (predicted + true); 0 for 0/0."""
    total = int(predicted.sum() + true.sum())
    return 2 * int(hits.sum()) / total if total else 0.0


def _regressed(outputs_BC: Array, targets_BC: Array) -> dict[str, float]:
    result = {"mse": float(((outputs_BC - targets_BC) ** 2).mean())}
    if (np.ptp(outputs_BC, axis=0) > 0).all() and (np.ptp(targets_BC, axis=0) > 0).all():
        correlations = [
            np.corrcoef(outputs_BC[:, column], targets_BC[:, column])[0, 1]
            for column in range(outputs_BC.shape[1])
        ]
        result["pearson"] = float(np.mean(correlations))
    return result
