"""Classification and regression: rows with `text`, perhaps `text_pair`, and `label` in.

Token ids and targets out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptj.data.examples import (
    Ids,
    TokenLists,
    compact,
    count_real_tokens,
    groups,
    load_arrays,
    padded,
    padding_id,
    save_arrays,
)
from gptj.data.labels import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    LabelNames,
    LabelSet,
    read_labels,
)
from gptj.data.rows import DataError, Row
from gptj.tokenizer import GPTJTokenizer

__all__ = ["MULTI_LABEL", "REGRESSION", "SINGLE_LABEL", "ClassificationData", "LabelSet"]

MOST_COUNTED = 20  # labels that a summary lists


class ClassificationExample(NamedTuple):
    input_ids: Ids
    target: np.ndarray[Any, Any]  # () a class number; (C) of 0 and 1; () or (C) numbers


class ClassificationData:
    """Texts or pairs of texts, cut to `max_length` tokens, and their labels.

    A pair's tokens follow each other without anything between them, as Hugging Face's tokenizer of
    GPT-J has it. Too long a pair loses tokens from the end of the longer text first.

    A row's `label` is a name or a class number (single_label_classification); a list of them, which
    may be empty, or a list of a 0 or 1 for each label (multi_label_classification); or a number or
    a list of numbers (regression). In CSV lists are JSON.

    Args:
        rows: with the columns `text` and `label`, and all or none with `text_pair`.
        max_length: tokens; the beginning of a longer text is kept.
        labels: those of the training data, for evaluation data. None finds them: names in
            alphabetical order, class number n as LABEL_n.
        label_names: the names in their order, instead of finding them: a label is the name that is
            written alike, be it text or a number; whole numbers are class numbers, if no name is a
            number and they begin with 0. Or a mapping of what the data write to names.
        problem_type: how labels are read, instead of finding out: whole numbers can be ratings.

    Raises:
        DataError: naming the row whose text is empty or whose label does not fit, or the readings
            of labels that can be read in several ways.
        ValueError: if max_length is below 1, or `labels` is given together with what it replaces.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        tokenizer: GPTJTokenizer,
        max_length: int,
        labels: LabelSet | None = None,
        *,
        label_names: LabelNames | None = None,
        problem_type: str | None = None,
    ) -> None:
        if labels is not None and (label_names is not None or problem_type is not None):
            raise ValueError("labels holds names and type: give no label_names or problem_type")
        self.max_length = max_length
        self._padding = padding_id(tokenizer)
        kept: list[Row] = []
        lists: list[Ids] = []
        for group in groups(rows):
            texts = [_nonempty(row, "text") for row in group]
            pairs = None
            if "text_pair" in group[0].values:
                pairs = [_nonempty(row, "text_pair") for row in group]
            # Not their texts, which would stay in memory until all rows are read.
            kept += [replace(row, values={"label": row.value("label")}) for row in group]
            encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)["input_ids"]
            lists += [compact(ids) for ids in encoded]
        if not kept:
            raise DataError("the data has no rows")
        self.labels, self.targets, self._reading = read_labels(
            kept, labels, label_names, problem_type
        )
        self._token_lists = TokenLists.of(lists)

    def save(self, folder: Path) -> None:
        tokens = self._token_lists
        arrays = {"ids": tokens.ids, "ends": tokens.ends, "targets": self.targets}
        fields = {
            "max_length": self.max_length,
            "padding": self._padding,
            "labels": asdict(self.labels),
            "reading": self._reading,
        }
        save_arrays(folder, arrays, fields)

    @classmethod
    def load(cls, folder: Path) -> ClassificationData:
        """What `save` has written, memory-mapped."""
        arrays, fields = load_arrays(folder)
        self = cls.__new__(cls)
        self._token_lists = TokenLists(arrays["ids"], arrays["ends"])
        self.targets = arrays["targets"]
        self.max_length, self._padding = fields["max_length"], fields["padding"]
        self.labels = LabelSet(**{**fields["labels"], "names": tuple(fields["labels"]["names"])})
        self._reading = fields["reading"]
        return self

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return self._token_lists.longest

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

    def summary(self) -> str:
        """How the labels were read, and how many rows have each."""
        names = self.labels.names
        read = f"{len(self)} rows, {self.labels.problem_type}, labels {self._reading}"
        if self.labels.problem_type == REGRESSION:
            return f"{read} from {self.targets.min():g} to {self.targets.max():g}"
        if self.labels.problem_type == MULTI_LABEL:
            counts = self.targets.sum(axis=0).astype(int)
        else:
            counts = np.bincount(self.targets, minlength=len(names))
        counted = [f"{name}: {count}" for name, count in zip(names, counts, strict=True)]
        more = f", and {len(names) - MOST_COUNTED} more" if len(names) > MOST_COUNTED else ""
        return f"{read}: {', '.join(counted[:MOST_COUNTED])}{more}"

    def count_items(self, batch: dict[str, Tensor]) -> int:
        """Rows: what the loss averages over."""
        return len(batch["labels"])

    def count_tokens(self, batch: dict[str, Tensor]) -> int:
        return count_real_tokens(batch)


def _nonempty(row: Row, column: str) -> str:
    text = row.text(column)
    if not text:
        raise row.error(column, "is empty")
    return text
