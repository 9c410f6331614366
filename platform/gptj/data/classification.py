"""Classification and regression: rows with `text` and `label` in, token ids and targets out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptj.config import PROBLEM_TYPES, GPTJConfig
from gptj.data.examples import (
    Ids,
    TokenLists,
    compact,
    count_real_tokens,
    groups,
    padded,
    padding_id,
)
from gptj.data.sources import DataError, Row
from gptj.tokenizer import GPTJTokenizer

REGRESSION, SINGLE_LABEL, MULTI_LABEL = PROBLEM_TYPES


@dataclass(frozen=True)
class LabelSet:
    """What a classifier tells apart: its outputs' names in order, and how labels are read."""

    names: tuple[str, ...]
    problem_type: str  # one of gptj.config.PROBLEM_TYPES

    def __post_init__(self) -> None:
        if self.problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"problem_type must be one of {', '.join(PROBLEM_TYPES)}, got {self.problem_type!r}"
            )
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"label names must be one or more, each once, got {self.names}")
        if self.problem_type == SINGLE_LABEL and len(self.names) < 2:
            raise ValueError(f"all rows have the label {self.names[0]!r}: nothing to tell apart")

    @classmethod
    def of(cls, config: GPTJConfig) -> LabelSet:
        """What a model was trained to tell apart."""
        names = tuple(config.id2label[number] for number in range(config.num_labels))
        # Hugging Face's rule where the type is not written down.
        default = REGRESSION if len(names) == 1 else SINGLE_LABEL
        return cls(names, config.problem_type or default)

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.names))


class ClassificationExample(NamedTuple):
    input_ids: Ids
    target: np.ndarray[Any, Any]  # () a class number; (C) of 0 and 1; () or (C) numbers


class ClassificationData:
    """Texts cut to `max_length` tokens, and their labels.

    A row's `label` is a name or a class number (single_label_classification), a list of names
    (multi_label_classification; may be empty), or a float or a list of them (regression).

    Args:
        rows: with the columns `text` and `label`.
        max_length: tokens; the beginning of a longer text is kept.
        labels: those of the training data, for evaluation data. None finds them: names in
            alphabetical order, class number n as LABEL_n.
        label_names: the names in their order, instead of finding them; class number n is the
            n-th of them.
        problem_type: how labels are read, instead of finding out: whole numbers can be ratings.

    Raises:
        DataError: naming the row whose text is empty or whose label does not fit.
        ValueError: if max_length is below 1, or `labels` is given together with what it replaces.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        tokenizer: GPTJTokenizer,
        max_length: int,
        labels: LabelSet | None = None,
        *,
        label_names: Sequence[str] | None = None,
        problem_type: str | None = None,
    ) -> None:
        if labels is not None and (label_names is not None or problem_type is not None):
            raise ValueError("labels holds names and type: give no label_names or problem_type")
        self.max_length = max_length
        self._padding = padding_id(tokenizer)
        kept: list[_Label] = []
        lists: list[Ids] = []
        for group in groups(rows):
            texts = [row.text("text") for row in group]
            kept += [_Label(row, row.value("label")) for row in group]
            encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
            lists += [compact(ids) for ids in encoded]
            for row, ids in zip(group, encoded, strict=True):
                if not ids:
                    raise row.error("text", "is empty")
        if not kept:
            raise DataError("the data has no rows")
        self.labels = labels or _find(kept, label_names, problem_type)
        self._token_lists = TokenLists(lists)
        self.targets = np.stack([_target(label, self.labels) for label in kept])

    def __len__(self) -> int:
        return len(self._token_lists)

    def __getitem__(self, index: int) -> ClassificationExample:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return ClassificationExample(self._token_lists[index], self.targets[index])

    def collate(self, examples: Sequence[ClassificationExample]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (B, L), and `labels`.

        (B) of int64 for a single label, (B, C) of fp32 for several, (B) or (B, C) of fp32 for
        one or several numbers.
        """
        batch = padded([example.input_ids for example in examples], self._padding, self.max_length)
        batch["labels"] = torch.from_numpy(np.stack([example.target for example in examples]))
        return batch

    def count_items(self, batch: dict[str, Tensor]) -> int:
        """Rows: what the loss averages over."""
        return len(batch["labels"])

    def count_tokens(self, batch: dict[str, Tensor]) -> int:
        return count_real_tokens(batch)


class _Label(NamedTuple):
    row: Row
    value: Any


def _find(
    labels: Sequence[_Label], names: Sequence[str] | None, problem_type: str | None
) -> LabelSet:
    """The label set of training data."""
    if problem_type is None:
        problem_type = _problem_type(labels)
    first = labels[0]
    if problem_type == REGRESSION:
        width = len(first.value) if isinstance(first.value, list) else 1
        found = tuple(f"LABEL_{number}" for number in range(width)) if names is None else names
    elif names is not None:
        found = names
    else:
        found = _names(labels)
    try:
        return LabelSet(tuple(found), problem_type)
    except ValueError as error:
        raise first.row.error("label", str(error)) from error


def _problem_type(labels: Sequence[_Label]) -> str:
    """By the kind of the values, which must be one for all rows."""
    for kind, problem_type in _KINDS:
        if all(kind(label.value) for label in labels):
            return problem_type
    first = labels[0]
    for kind, _ in _KINDS:  # a kind that the first row is and another one is not
        other = next((label for label in labels if not kind(label.value)), first)
        if kind(first.value) and other is not first:
            raise other.row.error(
                "label",
                f"is {other.value!r:.80}, but that of {first.row} is {first.value!r:.80}; "
                f"remedy: one kind of label in all rows",
            )
    raise first.row.error(
        "label",
        f"must be a name, a class number, a float, or a list of names or of floats, "
        f"got {first.value!r:.80}",
    )


def _names(labels: Sequence[_Label]) -> list[str]:
    """The names that occur, sorted; class numbers 0 to n give LABEL_0 to LABEL_n."""
    values = [value for label in labels for value in _listed(label.value)]
    names = {value for value in values if isinstance(value, str)}
    numbers = {int(value) for value in values if not isinstance(value, str)}
    if not numbers:
        return sorted(names)
    missing = sorted(set(range(max(numbers))) - numbers)
    if min(numbers) < 0 or missing:
        raise labels[0].row.error(
            "label",
            f"class numbers must be 0 to n without a gap, got {min(numbers)} to {max(numbers)}"
            + (f" without {missing[0]}" if missing else "")
            + "; remedy: label_names, or problem_type=regression for ratings",
        )
    return [f"LABEL_{number}" for number in range(len(numbers))]


def _target(label: _Label, labels: LabelSet) -> np.ndarray[Any, Any]:
    if labels.problem_type == SINGLE_LABEL:
        return np.array(_class_number(label, label.value, labels), dtype=np.int64)
    if labels.problem_type == MULTI_LABEL:
        if not isinstance(label.value, list):
            raise label.row.error("label", f"must be a list of names, got {label.value!r:.80}")
        target = np.zeros(len(labels.names), dtype=np.float32)
        target[[_class_number(label, name, labels) for name in label.value]] = 1
        return target
    numbers = _listed(label.value)
    if not all(_is_number(number) and math.isfinite(number) for number in numbers):
        raise label.row.error("label", f"must be a finite number, got {label.value!r:.80}")
    if len(numbers) != len(labels.names):
        raise label.row.error(
            "label", f"must be {len(labels.names)} numbers, got {label.value!r:.80}"
        )
    return np.array(numbers if len(numbers) > 1 else numbers[0], dtype=np.float32)


def _class_number(label: _Label, value: Any, labels: LabelSet) -> int:
    if isinstance(value, str) and value in labels.names:
        return labels.names.index(value)
    if isinstance(value, int) and 0 <= value < len(labels.names):
        return int(value)
    raise label.row.error(
        "label", f"{value!r:.80} is not one of the labels {', '.join(labels.names):.300}"
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


# The first that fits all rows decides: whole numbers are class numbers, unless some have a point.
_KINDS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda value: isinstance(value, str), SINGLE_LABEL),
    (lambda value: isinstance(value, int), SINGLE_LABEL),
    (_is_number, REGRESSION),
    (lambda value: isinstance(value, list) and all(isinstance(i, str) for i in value), MULTI_LABEL),
    (lambda value: isinstance(value, list) and all(_is_number(i) for i in value), REGRESSION),
)
