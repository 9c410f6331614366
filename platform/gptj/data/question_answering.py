"""Question answering: SQuAD rows in, windows of token ids with their answers' positions out.

A window is the question followed by as much of the context as fits; a longer context makes several
overlapping windows. Serving uses the same windows, and finds the answers in them.
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
from gptj.data.questions import NO_OFFSET, Offsets, read_answers, without_space
from gptj.data.rows import DataError, Row
from gptj.data.shards import lists_in
from gptj.data.words import Words
from gptj.model import span_loss
from gptj.tokenizer import GPTJTokenizer

NO_ANSWER = 0  # the token that stands for "not in this window": the question's first


@dataclass(frozen=True)
class Window:
    """A question and a part of its context."""

    input_ids: list[int]
    # (start, end) of each token in characters of the context, without surrounding white space;
    # None for tokens that cannot begin or end an answer: the question's, and white space.
    offsets: list[Offsets | None]


@dataclass(frozen=True)
class Span:
    """A part of the context, in characters; (0, 0) means no answer."""

    start: int
    end: int
    score: float  # probability


class Candidate(NamedTuple):
    """A span of one window, before its logits are compared with the other windows'."""

    logit: float  # of its start and its end together
    start: int
    end: int


def windows(
    tokenizer: GPTJTokenizer, question: str, context: str, max_length: int, stride: int
) -> list[Window]:
    """A question with each part of a context that fits into `max_length` tokens.

    White space around the question is stripped.

    Args:
        stride: tokens of the context by which consecutive windows overlap.

    Raises:
        ValueError: if the question or the context is empty, or the question leaves no room for
            more than `stride` tokens of the context.
    """
    question = question.strip()
    if not question or not context.strip():
        raise ValueError(f"the {'context' if question else 'question'} is empty")
    try:
        encoded = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_sequence_ids=True,
        )
    except ValueError as error:
        room = max_length - len(tokenizer.encode(question))
        if room > stride:
            raise
        raise _no_room(room, max_length, stride) from error
    return [
        Window(
            input_ids,
            [
                without_space(context, *offset) if sequence == 1 else None
                for offset, sequence in zip(offsets, sequence_ids, strict=True)
            ],
        )
        for input_ids, offsets, sequence_ids in zip(
            encoded["input_ids"], encoded["offset_mapping"], encoded["sequence_ids"], strict=True
        )
    ]


def cut_windows(
    question: Ids, context: Ids, offsets: Array, max_length: int, stride: int
) -> list[tuple[Ids, Array]]:
    """Like `windows`, from ids: each window's ids and offsets (tokens, 2), or NO_OFFSET.

    Args:
        offsets: (tokens of the context, 2), by gptj.data.questions.usable_offsets.

    Raises:
        ValueError: as in windows.
    """
    room = max_length - len(question)
    if len(context) > room and room <= stride:
        raise _no_room(room, max_length, stride)
    none = np.full((len(question), 2), NO_OFFSET, np.int32)
    found = []
    for start in range(0, max(len(context) - stride, 1), max(room - stride, 1)):
        part = slice(start, start + room)
        ids = np.concatenate([question, context[part]])
        found.append((ids, np.concatenate([none, offsets[part]])))
    return found


def _no_room(room: int, max_length: int, stride: int) -> ValueError:
    return ValueError(
        f"the question has {max_length - room} tokens and leaves {max(room, 0)} of "
        f"max_length={max_length} for the context, which must be more than stride={stride}; "
        f"remedy: a shorter question, a larger max_length or a smaller stride"
    )


def best_spans(
    windows: Sequence[Window],
    start_logits: Sequence[Tensor],
    end_logits: Sequence[Tensor],
    *,
    top_k: int = 1,
    max_answer_tokens: int = 15,
    handle_impossible_answer: bool = False,
    words: Words | None = None,
) -> list[Span]:
    """The most likely answers over all windows of one question, best first, without duplicates.

    A span's score is the probability of its start times that of its end, by softmax over the
    context; for a single window this equals Hugging Face's pipeline. A place covered by several
    windows counts once, with its highest logit, so that scores sum to at most 1.

    Args:
        start_logits, end_logits: (L) of each window; beyond its tokens is padding.
        top_k: maximum number of answers.
        max_answer_tokens: longest answer.
        handle_impossible_answer: let the empty answer (0, 0) compete, with the first token's
            logits in the window where they are lowest.
        words: the context's; widens each answer to whole words, see candidates.
    """
    if top_k < 1 or max_answer_tokens < 1:
        raise ValueError(
            f"top_k and max_answer_tokens must be 1 or more, got {top_k} and {max_answer_tokens}"
        )
    starts = [_as_array(logits) for logits in start_logits]
    ends = [_as_array(logits) for logits in end_logits]
    parts = list(zip(windows, starts, ends, strict=True))
    found = [
        candidate
        for window, start, end in parts
        for candidate in candidates(window, start, end, max_answer_tokens, top_k, words)
    ]
    totals = [_log_sum_exp(_by_place(windows, logits), null=None) for logits in (starts, ends)]
    if handle_impossible_answer:
        null = min(parts, key=lambda part: null_logit(part[1], part[2]))
        found.append(Candidate(null_logit(null[1], null[2]), 0, 0))
        totals = [
            _log_sum_exp(_by_place(windows, logits), null=float(part[NO_ANSWER]))
            for logits, part in zip((starts, ends), null[1:], strict=True)
        ]
    best: dict[Offsets, float] = {}
    for logit, start_place, end_place in sorted(
        found, key=lambda each: (-each.logit, each.start, each.end)
    ):
        best.setdefault((start_place, end_place), logit)
    return [
        Span(*place, score=float(np.exp(logit - sum(totals))))
        for place, logit in list(best.items())[:top_k]
    ]


def candidates(
    window: Window,
    start_logits: np.ndarray[Any, Any],
    end_logits: np.ndarray[Any, Any],
    max_answer_tokens: int,
    top_k: int,
    words: Words | None = None,
) -> list[Candidate]:
    """The `top_k` spans of a window with the largest sums of logits, best first, each once.

    Args:
        words: the context's; spans are widened to whole words, adding up the probabilities of
            spans that become equal.
    """
    tokens = [token for token, offset in enumerate(window.offsets) if offset is not None]
    if not tokens:
        return []
    first, last = tokens[0], tokens[-1] + 1
    usable = np.array([offset is not None for offset in window.offsets[first:last]])
    start = np.where(usable, start_logits[first:last], -np.inf)
    end = np.where(usable, end_logits[first:last], -np.inf)
    width = min(max_answer_tokens, len(start))
    # Row t: the spans from token t on, of 1 to `width` tokens.
    ends = np.lib.stride_tricks.sliding_window_view(
        np.concatenate([end, np.full(width - 1, -np.inf)]), width
    )
    if words is not None:
        return _whole_words(window.offsets[first:last], start[:, None] + ends, words, top_k)
    sums = (start[:, None] + ends).ravel()
    possible = int((sums > -np.inf).sum())
    found: dict[Offsets, float] = {}
    wanted = top_k
    while True:
        # Tokens can share a character, so several spans can cover the same characters.
        wanted = min(wanted, possible)
        largest = np.argpartition(-sums, wanted - 1)[:wanted]
        for place in largest[np.argsort(-sums[largest], kind="stable")].tolist():
            from_token, more = divmod(place, width)
            begin, end_offset = (
                window.offsets[first + from_token],
                window.offsets[first + from_token + more],
            )
            assert begin is not None
            assert end_offset is not None
            found.setdefault((begin[0], end_offset[1]), float(sums[place]))
        if len(found) >= top_k or wanted == possible:
            break
        wanted *= 2
    return [Candidate(logit, *place) for place, logit in list(found.items())[:top_k]]


def _whole_words(
    offsets: Sequence[Offsets | None], sums: np.ndarray[Any, Any], words: Words, top_k: int
) -> list[Candidate]:
    """The `top_k` best spans of a window as whole words.

    Args:
        sums: (tokens, width), logits of the spans by first token and length; -inf if invalid.
    """
    # A span's words begin by its first token alone, and end by its last.
    starts, start_of = np.unique([0 if o is None else o[0] for o in offsets], return_inverse=True)
    ends, end_of = np.unique([0 if o is None else o[1] for o in offsets], return_inverse=True)
    froms, lengths = np.nonzero(sums > -np.inf)
    # Tokens can share a character: spans of the same characters count once.
    highest = np.full(len(starts) * len(ends), -np.inf)
    spans = start_of[froms] * len(ends) + end_of[froms + lengths]
    np.maximum.at(highest, spans, sums[froms, lengths])
    spans = np.flatnonzero(highest > -np.inf)
    logits = highest[spans]
    begins, begin_of = np.unique([words.start(each) for each in starts], return_inverse=True)
    finishes, finish_of = np.unique([words.end(each) for each in ends], return_inverse=True)
    answers = begin_of[spans // len(ends)] * len(finishes) + finish_of[spans % len(ends)]
    # log-sum-exp for each answer.
    highest = np.full(len(begins) * len(finishes), -np.inf)
    np.maximum.at(highest, answers, logits)
    totals = np.bincount(answers, np.exp(logits - highest[answers]))
    found = np.flatnonzero(totals)
    merged = highest[found] + np.log(totals[found])
    best = np.argsort(-merged, kind="stable")[:top_k]
    return [
        Candidate(
            float(merged[each]),
            int(begins[found[each] // len(finishes)]),
            int(finishes[found[each] % len(finishes)]),
        )
        for each in best
    ]


def null_logit(start_logits: np.ndarray[Any, Any], end_logits: np.ndarray[Any, Any]) -> float:
    """A window's logit for "no answer here"."""
    return float(start_logits[NO_ANSWER] + end_logits[NO_ANSWER])


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


def _as_array(logits: Tensor) -> np.ndarray[Any, Any]:
    return logits.detach().double().cpu().numpy()


def _by_place(
    windows: Sequence[Window], logits: Sequence[np.ndarray[Any, Any]]
) -> dict[Offsets, float]:
    """The highest logit that any window gives to each place of the context."""
    places: dict[Offsets, float] = {}
    for window, values in zip(windows, logits, strict=True):
        for place, logit in zip(window.offsets, values.tolist(), strict=False):
            if place is not None:
                places[place] = max(logit, places.get(place, -np.inf))
    return places


def _log_sum_exp(places: dict[Offsets, float], null: float | None) -> float:
    values = [*places.values(), *([] if null is None else [null])]
    return float(np.logaddexp.reduce(values))
