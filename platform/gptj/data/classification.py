"""Classification and regression: rows with `text`, perhaps `text_pair`, and `label` in.

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
    read_labels,
)
from gptj.data.prepared import Prepared, PreparedTable
from gptj.data.rows import DataError, Row
from gptj.data.shards import lists_in
from gptj.tokenizer import GPTJTokenizer

__all__ = ["MULTI_LABEL", "REGRESSION", "SINGLE_LABEL", "ClassificationData", "LabelSet"]

LABELS_AT_ONCE = 4096  # several of each row are a number for each that there is
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
        """Cut prepared texts, and read their labels, into a new folder, for `load`.

        Memory holds one shard, and each label once. Arguments as of the constructor.

        Raises:
            DataError: as the constructor; or if the task or the tokenizer is another.
            CheckpointError: for a damaged shard.
        """
        prepared.check("classification", tokenizer)
        distinct = DistinctLabels()
        for table in prepared.tables():
            for rows, _ in _labelled_rows(table):
                for row in rows:
                    distinct.add(row)
        found, _, reading = read_labels(distinct.rows, labels, label_names, problem_type)
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
        """What `write` has written, memory-mapped."""
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


def _cut(table: PreparedTable, max_length: int) -> list[Ids]:
    """Each row's ids as the tokenizer truncates them: of a pair first the longer text."""
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
    """A few rows at a time: the first of them with each label, and which of these each row has."""
    for start in range(0, table.columns.num_rows, LABELS_AT_ONCE):
        labels = table.columns.column("label").slice(start, LABELS_AT_ONCE).combine_chunks()
        texts = labels.dictionary
        codes, places, numbers = np.unique(
            labels.indices.to_numpy(), return_index=True, return_inverse=True
        )
        order = np.argsort(places)  # the first row that does not fit is the one to be named
        rows = [
            table.row(start + place, label=json.loads(texts[code].as_py()))
            for code, place in zip(codes[order].tolist(), places[order].tolist(), strict=True)
        ]
        yield rows, np.argsort(order)[numbers]
