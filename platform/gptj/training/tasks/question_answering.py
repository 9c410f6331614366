"""Extractive question answering, measured as in SQuAD."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from gptj.data.labels import LabelSet
from gptj.data.prepared import Prepared
from gptj.data.question_answering import QuestionAnsweringData, answer_loss
from gptj.data.rows import Row
from gptj.data.spans import candidates, null_logit
from gptj.data.words import Words
from gptj.model import GPTJForQuestionAnswering
from gptj.tokenizer import GPTJTokenizer
from gptj.training.sections import DataSettings
from gptj.training.tasks.base import Part, Task, check_all_there

MAX_ANSWER_TOKENS = 30  # as in Hugging Face's evaluation of SQuAD

Array = np.ndarray[Any, Any]


class QuestionAnswering(Task[QuestionAnsweringData]):
    name = "question-answering"
    head = GPTJForQuestionAnswering
    text_columns = ("question", "context")
    sample = "sample://questions"
    best_by = ("f1",)
    own_settings = ("stride",)

    def read(
        self,
        rows: Iterable[Row],
        tokenizer: GPTJTokenizer,
        options: DataSettings,
        labels: LabelSet | None = None,
    ) -> QuestionAnsweringData:
        return QuestionAnsweringData(rows, tokenizer, options.sequence_length, options.stride)

    def write(
        self,
        folder: Path,
        prepared: Prepared,
        tokenizer: GPTJTokenizer,
        options: DataSettings,
        labels: LabelSet | None = None,
    ) -> None:
        length, stride = options.sequence_length, options.stride
        QuestionAnsweringData.write(folder, prepared, tokenizer, length, stride)

    def load(self, folder: Path) -> QuestionAnsweringData:
        return QuestionAnsweringData.load(folder)

    def forward(self, model: nn.Module, batch: dict[str, Tensor], items: int) -> tuple[Tensor, Any]:
        output = model(batch["input_ids"], attention_mask=batch["attention_mask"])
        # Not the model's own loss, where padding competes with the answer.
        return answer_loss(output.start_logits, output.end_logits, batch) * items, output

    def outputs(
        self, data: QuestionAnsweringData, output: Any, examples: Sequence[int]
    ) -> list[Any]:
        starts = output.start_logits.double().cpu().numpy()
        ends = output.end_logits.double().cpu().numpy()
        return [
            _answer(data, example, starts[row], ends[row]) for row, example in enumerate(examples)
        ]

    def metrics(self, data: QuestionAnsweringData, whole: Part) -> dict[str, float]:
        """`loss`; `exact_match` and `f1`, from 0 to 1, of answers in whole words, as served."""
        check_all_there(data, whole)
        return {"loss": whole.loss / whole.items, **_answered(data, whole.outputs)}

    def check(self, options: DataSettings) -> None:
        if options.stride >= options.sequence_length:
            raise ValueError(
                f"data.stride={options.stride} must be below "
                f"data.sequence_length={options.sequence_length}"
            )


@dataclass(frozen=True)
class Answer:
    """One window's best span, in characters, and its no-answer logit."""

    start: int
    end: int
    logit: float  # of the span; minus infinity if the window has none
    null_logit: float


def exact_match(prediction: str, answer: str) -> float:
    """1 if both have the same words, by SQuAD's official rules."""
    return float(normalized(prediction) == normalized(answer))


def overlap_f1(prediction: str, answer: str) -> float:
    """F1 of word overlap, by SQuAD's official rules."""
    ours, theirs = normalized(prediction).split(), normalized(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def normalized(text: str) -> str:
    """Lowercase; strip punctuation, articles and extra whitespace."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@lru_cache(maxsize=4)  # a context's windows follow each other, and a long one has hundreds
def _words(context: str) -> Words:
    return Words(context)


def _answer(data: QuestionAnsweringData, example: int, start: Array, end: Array) -> Answer:
    null = null_logit(start, end)
    words = _words(data.questions[data.question_of(example)].context)
    best = candidates(data.window(example), start, end, MAX_ANSWER_TOKENS, 1, words)
    if not best:
        return Answer(0, 0, -math.inf, null)
    return Answer(best[0].start, best[0].end, best[0].logit, null)


def _answered(data: QuestionAnsweringData, outputs: dict[int, Answer]) -> dict[str, float]:
    """Mean score of each question's best span over its windows, against its closest answer.

    "No answer" is considered only if the data has unanswerable questions.
    """
    windows: dict[int, list[Answer]] = {}
    for example, answer in outputs.items():
        windows.setdefault(data.question_of(example), []).append(answer)
    impossible = any(not question.answers for question in data.questions)
    exact, f1 = [], []
    for number, question in enumerate(data.questions):
        best = max(windows[number], key=lambda answer: answer.logit)
        prediction = question.context[best.start : best.end]
        if impossible and min(answer.null_logit for answer in windows[number]) > best.logit:
            prediction = ""
        answers = question.answers or ("",)
        exact.append(max(exact_match(prediction, answer) for answer in answers))
        f1.append(max(overlap_f1(prediction, answer) for answer in answers))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}
