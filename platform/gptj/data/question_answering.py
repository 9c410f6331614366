"""Question answering: SQuAD rows in, windows of token ids with their answers' positions out.

Serving uses the same windows (gptj.data.windows), and finds the answers in them (gptj.data.spans).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from gptj.data.arrays import Array, load_arrays, writing_arrays
from gptj.data.examples import Ids, TokenLists, compact, count_real_tokens, padded, padding_id
from gptj.data.prepared import Prepared, PreparedTable
from gptj.data.questions import NO_OFFSET, Offsets, read_answers
from gptj.data.rows import DataError, Row
from gptj.data.shards import lists_in
from gptj.data.windows import NO_ANSWER, Window, cut_windows, windows
from gptj.model import span_loss
from gptj.tokenizer import GPTJTokenizer


def answer_loss(start_logits: Tensor, end_logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The model's loss with padding masked out: (B, L) logits in, () out.

    In Hugging Face's loss, which the model uses, padding competes for the answer, so a row's loss
    depends on the lengths of the batch's other rows. This one does not.
    """
    padding = batch["attention_mask"].to(start_logits.device, non_blocking=True) == 0
    start_loss, end_loss = (
        span_loss(logits.float().masked_fill(padding, -torch.inf), positions)
        for logits, positions in (
            (start_logits, batch["start_positions"]),
            (end_logits, batch["end_positions"]),
        )
    )
    return (start_loss + end_loss) / 2


class QuestionAnsweringExample(NamedTuple):
    input_ids: Ids
    start: int  # the answer's first token, or NO_ANSWER
    end: int  # its last token, or NO_ANSWER
    number: int  # of the window in the data set


@dataclass(frozen=True)
class Question:
    """A row's context and its accepted answers; none if unanswerable."""

    context: str
    answers: tuple[str, ...]


class _StoredQuestions(Sequence[Question]):
    """Questions as JSON in one array of bytes, parsed on access."""

    def __init__(self, texts: np.ndarray[Any, Any], ends: np.ndarray[Any, Any]) -> None:
        self._texts = texts
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        text = self._texts[self._ends[number] : self._ends[number + 1]].tobytes()
        context, *answers = json.loads(text)
        return Question(context, tuple(answers))


class QuestionAnsweringData:
    """Every window of every row is an example, trained on the row's first answer.

    Windows without the whole answer, and rows without answers, point to token 0.

    Args:
        rows: with SQuAD's columns `question`, `context` and
            `answers` ({"text": [...], "answer_start": [...]} in characters, or a list of
            {"text": ..., "answer_start": ...}; CSV has it as JSON, and an empty cell for none).
        max_length: tokens of a window, question and context together.
        stride: tokens of the context by which consecutive windows overlap.

    Raises:
        DataError: naming a row whose question leaves no room for the context, or whose answer is
            not at its position in the context.
    """

    labels = None  # only classifiers have them

    def __init__(
        self, rows: Iterable[Row], tokenizer: GPTJTokenizer, max_length: int, stride: int
    ) -> None:
        self.max_length = max_length
        self._padding = padding_id(tokenizer)
        questions: list[Question] = []
        numbers: list[int] = []
        lists: list[Ids] = []
        offsets: list[np.ndarray[Any, Any]] = []
        places: list[Offsets] = []
        for row in rows:
            question, context = row.text("question"), row.text("context")
            answers = read_answers(row)
            try:
                parts = windows(tokenizer, question, context, max_length, stride)
            except ValueError as error:
                raise row.error("question", str(error)) from error
            for part in parts:
                numbers.append(len(questions))
                lists.append(compact(part.input_ids))
                offsets.append(np.array([offset or NO_OFFSET for offset in part.offsets], np.int32))
                places.append(
                    _tokens_of(answers[0], offsets[-1]) if answers else (NO_ANSWER, NO_ANSWER)
                )
            questions.append(Question(context, tuple(text for text, _ in answers)))
        if not lists:
            raise DataError("the data has no rows")
        self.questions: Sequence[Question] = questions
        self._token_lists = TokenLists.of(lists)
        self._offsets = np.concatenate(offsets)  # (tokens of all windows, 2)
        self._places = np.array(places, dtype=np.int32)  # (windows, 2)
        self._questions = np.array(numbers, dtype=np.int32)  # (windows)

    @classmethod
    def write(
        cls,
        folder: Path,
        prepared: Prepared,
        tokenizer: GPTJTokenizer,
        max_length: int,
        stride: int,
    ) -> None:
        """Cut prepared questions into windows in a new folder, for `load`.

        Memory holds one shard.

        Raises:
            DataError: if a question leaves no room, unless the data was prepared with bad rows
                skipped; or if it was prepared for another task or tokenizer.
            CheckpointError: for a damaged shard.
        """
        prepared.check("question-answering", tokenizer)
        fields = {"max_length": max_length, "padding": padding_id(tokenizer)}
        number = 0
        with writing_arrays(folder, fields) as arrays, prepared.skipping() as on_bad:
            for table in prepared.tables():
                for question in _prepared_questions(table):
                    try:
                        parts = cut_windows(*question.encoded, max_length, stride)
                    except ValueError as error:
                        on_bad(table.row(question.number).error("question", str(error)))
                        continue
                    answers = question.answers
                    places = [
                        _tokens_of(answers[0], offsets) if answers else (NO_ANSWER, NO_ANSWER)
                        for _, offsets in parts
                    ]
                    arrays.append("ids", np.concatenate([ids for ids, _ in parts]))
                    arrays.append_ends("ends", np.array([len(ids) for ids, _ in parts]))
                    arrays.append("offsets", np.concatenate([offsets for _, offsets in parts]))
                    arrays.append("places", np.array(places, np.int32))
                    arrays.append("questions", np.full(len(parts), number, np.int32))
                    text = json.dumps([question.context, *(each for each, _ in answers)]).encode()
                    arrays.append("texts", np.frombuffer(text, np.uint8))
                    arrays.append_ends("text_ends", np.array([len(text)]))
                    number += 1
            if not number:
                raise DataError(f"{prepared.source} has no usable question")

    @classmethod
    def load(cls, folder: Path) -> QuestionAnsweringData:
        """Memory-map data written by `write`."""
        arrays, fields = load_arrays(folder)
        self = cls.__new__(cls)
        self.max_length, self._padding = fields["max_length"], fields["padding"]
        self.questions = _StoredQuestions(arrays["texts"], arrays["text_ends"])
        self._token_lists = TokenLists(arrays["ids"], arrays["ends"])
        self._offsets, self._places = arrays["offsets"], arrays["places"]
        self._questions = arrays["questions"]
        return self

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return self._token_lists.longest

    def __len__(self) -> int:
        return len(self._token_lists)

    def __getitem__(self, index: int) -> QuestionAnsweringExample:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start, end = self._places[index].tolist()
        return QuestionAnsweringExample(self._token_lists[index], start, end, index)

    def question_of(self, index: int) -> int:
        """The index, in `questions`, of a window's question."""
        return int(self._questions[index])

    def window(self, index: int) -> Window:
        """An example as a Window, for `best_spans`."""
        ends = self._token_lists.ends
        offsets = self._offsets[ends[index] : ends[index + 1]].tolist()
        return Window(
            self._token_lists[index].tolist(),
            [(start, end) if start >= 0 else None for start, end in offsets],
        )

    def collate(self, examples: Sequence[QuestionAnsweringExample]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` (B, L), `start_positions`, `end_positions` (B), int64."""
        batch = padded([example.input_ids for example in examples], self._padding, self.max_length)
        batch["start_positions"] = torch.tensor([example.start for example in examples])
        batch["end_positions"] = torch.tensor([example.end for example in examples])
        return batch

    def count_items(self, batch: dict[str, Tensor]) -> int:
        """Rows, which the loss averages over."""
        return len(batch["start_positions"])

    def count_tokens(self, batch: dict[str, Tensor]) -> int:
        return count_real_tokens(batch)

    def summary(self) -> str:
        return f"{len(self.questions)} questions in {len(self)} windows"


class _PreparedQuestion(NamedTuple):
    number: int  # in its shard
    encoded: tuple[Ids, Ids, Array]  # the question, its context, and the context's offsets
    context: str
    answers: Sequence[tuple[str, int]]


def _prepared_questions(table: PreparedTable) -> Iterator[_PreparedQuestion]:
    questions, question_ends = lists_in(table.columns, "question")
    contexts, ends = lists_in(table.columns, "context")
    offsets = np.stack([lists_in(table.columns, side)[0] for side in ("starts", "ends")], axis=1)
    texts, answers, starts = (
        table.columns.column(name).to_pylist() for name in ("text", "answers", "answer_starts")
    )
    for number, text in enumerate(texts):
        context = slice(ends[number], ends[number + 1])
        yield _PreparedQuestion(
            number,
            (
                questions[question_ends[number] : question_ends[number + 1]],
                contexts[context],
                offsets[context],
            ),
            text,
            list(zip(answers[number], starts[number], strict=True)),
        )


def _tokens_of(answer: tuple[str, int], offsets: Array) -> Offsets:
    """The first and last token of an answer, or NO_ANSWER twice if it is not fully covered."""
    text, start = answer
    end = start + len(text.rstrip())
    start += len(text) - len(text.lstrip())
    # A token may begin before the answer, or end after it: "1,000km" can be one token.
    # NO_OFFSET ends before any answer.
    covering = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
    if not len(covering):
        return NO_ANSWER, NO_ANSWER
    first, last = int(covering[0]), int(covering[-1])
    if offsets[first, 0] > start or offsets[last, 1] < end:
        return NO_ANSWER, NO_ANSWER
    return first, last
