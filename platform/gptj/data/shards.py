"""Shards of prepared data by task: rows in, columns of a Parquet file out, and back.

They are independent of a run's settings, such as its sequence length or the meaning of labels:

    causal-lm            `input_ids` of a document, and `learned` unless all of them are
    classification       `input_ids` of the text, `pair_ids` of the other one if texts come in
                         pairs, and the `label` in JSON
    question-answering   ids of `question` and `context`, where the context's tokens begin and end
                         (`starts`, `ends`; -1: no answer can begin or end there), its `text`, and
                         the `answers` with their `answer_starts`, in characters

The latter two also have each row's origin: `file`, the index of a file in the plan's part, and
`row`, its number in the file.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from gptj.data.arrays import Array
from gptj.data.documents import ROW_KINDS, Document, Documents, read_documents
from gptj.data.examples import Ids, compact, groups
from gptj.data.labels import LabelNames, check_label
from gptj.data.questions import read_answers, usable_offsets
from gptj.data.rows import DataError, Row
from gptj.environment.extras import Extra
from gptj.tokenizer import GPTJTokenizer

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet
else:
    pyarrow = Extra("pyarrow", "prepared data")

TaskName = Literal["causal-lm", "classification", "question-answering"]
QUESTIONS_AT_ONCE = 64

OnBadRow = Callable[[DataError], None]


class Content(NamedTuple):
    """A shard before it is written; without rows it has no columns."""

    columns: Mapping[str, Any]  # pyarrow's arrays
    rows: int
    tokens: int
    learned: int  # tokens that the loss may count
    digest: str  # SHA-256 of ids, labels and answers; independent of file names


@dataclass(frozen=True)
class Source:
    """The origin of a shard's rows, and how they are read."""

    files: Sequence[str]  # of the part
    label_names: LabelNames | None = None
    problem_type: str | None = None


class ShardKind(NamedTuple):
    row_kinds: tuple[tuple[str, ...], ...]  # columns of each kind of rows, by our names
    encode: Callable[[Sequence[Row], GPTJTokenizer, Source, OnBadRow], Content]


def to_parquet(content: Content) -> bytes:
    """A shard's file; equal rows give equal bytes."""
    buffer = io.BytesIO()
    table = pyarrow.table(dict(content.columns))
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(content: bytes) -> pyarrow.Table:
    return pyarrow.parquet.read_table(io.BytesIO(content), read_dictionary=["label"])


def documents_in(table: pyarrow.Table) -> Documents:
    """A language model's documents."""
    ids, ends = lists_in(table, "input_ids")
    learned = lists_in(table, "learned")[0] if "learned" in table.column_names else None
    return Documents(ids, ends, learned)


def lists_in(table: pyarrow.Table, name: str) -> tuple[Array, Array]:
    """A column's concatenated lists and their offsets: list i is [ends[i]:ends[i + 1]]."""
    lists = table.column(name).combine_chunks()
    ends = lists.offsets.to_numpy().astype(np.int64)
    return lists.flatten().to_numpy(zero_copy_only=False), ends - ends[0]


def encode_texts(texts: Sequence[str], tokenizer: GPTJTokenizer) -> list[Ids]:
    """Each text's ids, without truncation."""
    return [
        compact(ids) for ids in tokenizer(list(texts), return_attention_mask=False)["input_ids"]
    ]


def check_labelled(
    row: Row, names: LabelNames | None = None, problem_type: str | None = None
) -> None:
    """DataError for a row that a classifier cannot learn from. Arguments as in check_label."""
    for column in ("text", "text_pair"):
        if column in row.values and not row.text(column):
            raise row.error(column, "is empty")
    check_label(row, names, problem_type)


def _documents(
    rows: Sequence[Row], tokenizer: GPTJTokenizer, source: Source, on_bad: OnBadRow
) -> Content:
    documents = list(read_documents(rows, tokenizer, on_bad))
    joined = Documents.of(documents)
    columns = {"input_ids": _lists(joined.ids, joined.ends)}
    if joined.learned is not None:
        columns["learned"] = _lists(joined.learned, joined.ends)
    learned = sum(_learned(each) for each in documents)
    parts = ((each.ids, _packed_bits(each)) for each in documents)
    return _content(columns, len(documents), len(joined.ids), learned, parts)


def _learned(document: Document) -> int:
    return len(document.ids) if document.learned is None else int(document.learned.sum())


def _packed_bits(document: Document) -> str:
    return "" if document.learned is None else np.packbits(document.learned).tobytes().hex()


def _labelled(
    rows: Sequence[Row], tokenizer: GPTJTokenizer, source: Source, on_bad: OnBadRow
) -> Content:
    good: list[Row] = []
    lists: list[Ids] = []
    pairs: list[Ids] = []

    def check(row: Row) -> None:
        check_labelled(row, source.label_names, source.problem_type)

    for group in groups(_good(rows, check, on_bad)):
        good += group
        lists += encode_texts([row.text("text") for row in group], tokenizer)
        if "text_pair" in group[0].values:
            pairs += encode_texts([row.text("text_pair") for row in group], tokenizer)
    labels = [json.dumps(row.value("label"), ensure_ascii=False) for row in good]
    columns = {
        "input_ids": _joined(lists),
        "label": pyarrow.array(labels, pyarrow.string()).dictionary_encode(),
        **({"pair_ids": _joined(pairs)} if pairs else {}),
        **_places(good, source),
    }
    tokens = sum(map(len, lists)) + sum(map(len, pairs))
    parts = list(zip(lists, labels, strict=True)) + [(ids, "pair") for ids in pairs]
    return _content(columns, len(good), tokens, tokens, parts)


def _questions(
    rows: Sequence[Row], tokenizer: GPTJTokenizer, source: Source, on_bad: OnBadRow
) -> Content:
    good: list[Row] = []
    questions: list[Ids] = []
    contexts: list[Ids] = []
    offsets: list[Array] = []
    answers: list[list[tuple[str, int]]] = []

    def check(row: Row) -> None:
        answers_of[id(row)] = read_answers(row)

    for rows_at_once in groups(rows, QUESTIONS_AT_ONCE):
        answers_of: dict[int, list[tuple[str, int]]] = {}
        group = list(_good(rows_at_once, check, on_bad))
        if not group:
            continue
        good += group
        answers += [answers_of[id(row)] for row in group]
        questions += encode_texts([row.text("question").strip() for row in group], tokenizer)
        texts = list(dict.fromkeys(row.text("context") for row in group))  # SQuAD repeats them
        encoded = tokenizer(texts, return_attention_mask=False, return_offsets_mapping=True)
        ids = dict(zip(texts, map(compact, encoded["input_ids"]), strict=True))
        places = {
            text: usable_offsets(text, each)
            for text, each in zip(texts, encoded["offset_mapping"], strict=True)
        }
        contexts += [ids[row.text("context")] for row in group]
        offsets += [places[row.text("context")] for row in group]
    starts, ends = ([each[:, side] for each in offsets] for side in (0, 1))
    columns = {
        "question": _joined(questions),
        "context": _joined(contexts),
        "starts": _joined(starts),
        "ends": _joined(ends),
        "text": pyarrow.array([row.text("context") for row in good], pyarrow.large_string()),
        "answers": pyarrow.array(
            [[text for text, _ in each] for each in answers], pyarrow.list_(pyarrow.string())
        ),
        "answer_starts": pyarrow.array(
            [[start for _, start in each] for each in answers], pyarrow.list_(pyarrow.int32())
        ),
        **_places(good, source),
    }
    tokens = sum(map(len, questions)) + sum(map(len, contexts))
    parts = (
        (
            np.concatenate([question, context]),
            json.dumps([len(question), row.text("context"), each]),
        )
        for question, context, row, each in zip(questions, contexts, good, answers, strict=True)
    )
    return _content(columns, len(good), tokens, tokens, parts)


SHARD_KINDS: Mapping[TaskName, ShardKind] = {
    "causal-lm": ShardKind(tuple(ROW_KINDS), _documents),
    "classification": ShardKind((("text", "label"), ("text", "text_pair", "label")), _labelled),
    "question-answering": ShardKind((("question", "context", "answers"),), _questions),
}


def _good(rows: Iterable[Row], check: Callable[[Row], None], on_bad: OnBadRow) -> Iterable[Row]:
    for row in rows:
        try:
            check(row)
        except DataError as error:
            on_bad(error)
        else:
            yield row


def _content(
    columns: Mapping[str, Any],
    rows: int,
    tokens: int,
    learned: int,
    parts: Iterable[tuple[Ids, str]],
) -> Content:
    digest = hashlib.sha256()
    for ids, rest in parts:
        digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i4").tobytes())
        digest.update(rest.encode())
    return Content(columns if rows else {}, rows, tokens, learned, digest.hexdigest())


def _places(rows: Sequence[Row], source: Source) -> dict[str, Any]:
    numbers = {file: number for number, file in enumerate(source.files)}
    return {
        "file": pyarrow.array([numbers[row.source] for row in rows], pyarrow.int32()),
        "row": pyarrow.array([row.number for row in rows], pyarrow.int64()),
    }


def _joined(lists: Sequence[Array]) -> Any:
    ids = np.concatenate([np.empty(0, np.int32), *lists])
    return _lists(ids, np.cumsum([0, *map(len, lists)]))


def _lists(values: Array, ends: Array) -> Any:
    return pyarrow.ListArray.from_arrays(
        pyarrow.array(ends, pyarrow.int32()), pyarrow.array(values)
    )
