"""Classification and regression: rows of `text`, `text_pair` (optional) and `label` in.

Token ids and targets out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptj.data.arrays import Array, load_arrays, writing_arrays
from gptj.data.examples import (
    Ids,
    TokenLists,
    compact,
    count_real_tokens,
    groups,
    padded,
    padding_id,
)
from gptj.data.labels import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    DistinctLabels,
    LabelNames,
    LabelSet,
    ReadLabels,
    read_labels,
)
from gptj.data.prepared import Prepared, PreparedTable
from gptj.data.rows import DataError, Row
from gptj.data.shards import lists_in
from gptj.tokenizer import GPTJTokenizer

__all__ = [
    "MULTI_LABEL",
    "REGRESSION",
    "SINGLE_LABEL",
    "ClassificationData",
    "LabelSet",
    "read_all_labels",
]

LABELS_AT_ONCE = 4096  # rows; multi-label targets take a number per row and label
MAX_COUNTED = 20  # most labels listed in a summary


class ClassificationExample(NamedTuple):
    input_ids: Ids
    target: np.ndarray[Any, Any]  # () class index; (C) 0 and 1; () or (C) regression values


class ClassificationData:
    """Texts or pairs of texts, cut to `max_length` tokens, and their labels.

    A pair is concatenated without a separator, like Hugging Face's GPT-J tokenizer does. A pair
    that is too long loses the end of its longer text first.

    A row's `label` is a name or a class index (single_label_classification); a list of them, which
    may be empty, or a list of a 0 or 1 per label (multi_label_classification); or a number or a
    list of numbers (regression). In CSV, lists are JSON.

    Args:
        rows: with the columns `text` and `label`, and all or none with `text_pair`.
        max_length: tokens; the beginning of a longer text is kept.
        labels: the training data's, for evaluation data. None: inferred; names in alphabetical
            order, class index n as LABEL_n.
        label_names: the names in order, instead of inferring them: a label equals a name as
            written, whether text or number; whole numbers are class indices if no name is a number
            and they start at 0. Or a mapping from values in the data to names.
        problem_type: instead of inferring it; for example, whole numbers can be ratings.

    Raises:
        DataError: naming a row with an empty text or an invalid label, or the possible readings of
            ambiguous labels.
        ValueError: if max_length is below 1, or `labels` is combined with label_names or
            problem_type.
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
            raise ValueError("labels already has names and type: drop label_names and problem_type")
        self.max_length = max_length
        self._padding = padding_id(tokenizer)
        kept: list[Row] = []
        lists: list[Ids] = []
        for group in groups(rows):
            texts = [_nonempty(row, "text") for row in group]
            pairs = None
            if "text_pair" in group[0].values:
                pairs = [_nonempty(row, "text_pair") for row in group]
            # Drop the texts, which would stay in memory until all rows are read.
            kept += [replace(row, values={"label": row.value("label")}) for row in group]
            encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)["input_ids"]
            lists += [compact(ids) for ids in encoded]
        if not kept:
            raise DataError("the data has no rows")
        self.labels, self.targets, self._reading = read_labels(
            kept, labels, label_names, problem_type
        )
        self._token_lists = TokenLists.of(lists)

    @classmethod
    def write(
        cls,
        folder: Path,
        prepared: Prepared,
        tokenizer: GPTJTokenizer,
        max_length: int,
        labels: LabelSet | None = None,
        *,
        label_names: LabelNames | None = None,
        problem_type: str | None = None,
    ) -> None:
        """Truncate prepared texts and read their labels into a new folder, for `load`.

        Memory holds one shard, and each distinct label once. Arguments as in the constructor.

        Raises:
            DataError: as in the constructor; or if prepared for another task or tokenizer.
            CheckpointError: for a damaged shard.
        """
        prepared.check("classification", tokenizer)
        found, _, reading = read_all_labels([prepared], labels, label_names, problem_type)
        fields = {
            "max_length": max_length,
            "padding": padding_id(tokenizer),
            "labels": asdict(found),
            "reading": reading,
        }
        with writing_arrays(folder, fields) as arrays:
            for table in prepared.tables():
                lists = _cut(table, max_length)
                arrays.append("ids", np.concatenate(lists))
                arrays.append_ends("ends", np.array([len(ids) for ids in lists]))
                for rows, numbers in _labelled_rows(table):
                    arrays.append("targets", read_labels(rows, found).targets[numbers])

    @classmethod
    def load(cls, folder: Path) -> ClassificationData:
        """Memory-map data written by `write`."""
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

        Labels are (B) int64 for single-label, (B, C) fp32 for multi-label, and (B) or (B, C) fp32
        for regression.
        """
        batch = padded([example.input_ids for example in examples], self._padding, self.max_length)
        batch["labels"] = torch.from_numpy(np.stack([example.target for example in examples]))
        return batch

    def summary(self) -> str:
        """How the labels were interpreted, and how many rows have each."""
        names = self.labels.names
        read = f"{len(self)} rows, {self.labels.problem_type}, labels {self._reading}"
        if self.labels.problem_type == REGRESSION:
            return f"{read} from {self.targets.min():g} to {self.targets.max():g}"
        if self.labels.problem_type == MULTI_LABEL:
            counts = self.targets.sum(axis=0).astype(int)
        else:
            counts = np.bincount(self.targets, minlength=len(names))
        counted = [f"{name}: {count}" for name, count in zip(names, counts, strict=True)]
        more = f", and {len(names) - MAX_COUNTED} more" if len(names) > MAX_COUNTED else ""
        return f"{read}: {', '.join(counted[:MAX_COUNTED])}{more}"

    def count_items(self, batch: dict[str, Tensor]) -> int:
        """Rows, which the loss averages over."""
        return len(batch["labels"])

    def count_tokens(self, batch: dict[str, Tensor]) -> int:
        return count_real_tokens(batch)


def read_all_labels(
    sources: Iterable[Prepared],
    labels: LabelSet | None = None,
    label_names: LabelNames | None = None,
    problem_type: str | None = None,
) -> ReadLabels:
    """The labels of prepared data, as one data set, and the targets of its distinct labels.

    Memory holds one shard, and each distinct label once. Arguments and errors as in `read_labels`.
    """
    distinct = DistinctLabels(problem_type if labels is None else labels.problem_type)
    for prepared in sources:
        for table in prepared.tables():
            for rows, _ in _labelled_rows(table):
                for row in rows:
                    distinct.add(row)
    return read_labels(distinct.rows, labels, label_names, problem_type)


def _nonempty(row: Row, column: str) -> str:
    text = row.text(column)
    if not text:
        raise row.error(column, "is empty")
    return text


def _cut(table: PreparedTable, max_length: int) -> list[Ids]:
    """Each row's ids, truncated as by the tokenizer: the longer text of a pair first."""
    texts = _each(*lists_in(table.columns, "input_ids"))
    if "pair_ids" not in table.columns.column_names:
        return [text[:max_length] for text in texts]
    found = []
    for text, pair in zip(texts, _each(*lists_in(table.columns, "pair_ids")), strict=True):
        if len(text) + len(pair) > max_length:
            shorter = min(len(text), len(pair), max_length // 2)
            rooms = (shorter, max_length - shorter)
            first, second = rooms if len(text) <= len(pair) else rooms[::-1]
            text, pair = text[:first], pair[:second]
        found.append(np.concatenate([text, pair]))
    return found


def _each(ids: Ids, ends: Array) -> list[Ids]:
    return [ids[start:end] for start, end in pairwise(ends.tolist())]


def _labelled_rows(table: PreparedTable) -> Iterator[tuple[list[Row], Array]]:
    """Chunks of rows: the first row with each label, and each row's index into those."""
    for start in range(0, table.columns.num_rows, LABELS_AT_ONCE):
        labels = table.columns.column("label").slice(start, LABELS_AT_ONCE).combine_chunks()
        texts = labels.dictionary
        codes, places, numbers = np.unique(
            labels.indices.to_numpy(), return_index=True, return_inverse=True
        )
        order = np.argsort(places)  # so that errors name the first bad row
        rows = [
            table.row(start + place, label=json.loads(texts[code].as_py()))
            for code, place in zip(codes[order].tolist(), places[order].tolist(), strict=True)
        ]
        yield rows, np.argsort(order)[numbers]
