"""Hugging Face Inference's question answering: a question and a context in, a span of it out.

{"inputs": {"question": "Where is it?", "context": "It is in Rome."}}
-> {"answer": "Rome", "start": 9, "end": 13, "score": 0.91}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch.nn.functional as F
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from gptj.data.spans import best_spans
from gptj.data.windows import Window, windows
from gptj.data.words import Words
from gptj.model import GPTJForQuestionAnswering
from gptj.serving.app import DEFAULTS, HTTPOptions, add_health, new_app
from gptj.serving.batched_rows import BatchedRows, Batching
from gptj.serving.errors import InvalidRequestError, ModelError
from gptj.serving.keys.account import reserve_tokens
from gptj.serving.keys.ledger import Ledger
from gptj.serving.metrics import Recorder
from gptj.serving.openapi import errors
from gptj.serving.reply_threads import in_reply_thread
from gptj.serving.requests import RequestModel, bounds, checked_text, examples
from gptj.serving.text_threads import in_text_thread
from gptj.tokenizer import GPTJTokenizer

MAX_WINDOWS = 256  # of one request
MAX_ANSWERS = 100
MAX_ANSWER_TOKENS = 512
DEFAULT_WINDOW = 384  # tokens; this and the next are Hugging Face's
DEFAULT_STRIDE = 128


class QuestionAndContext(RequestModel):
    question: Annotated[str, bounds(pattern=r"\S")]
    context: Annotated[str, bounds(pattern=r"\S")]

    @field_validator("question", "context")
    @classmethod
    def _is_text(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("must not be empty")
        return checked_text(text)


class QuestionAnsweringParameters(RequestModel):
    # Answers; more than 1 returns a list.
    top_k: Annotated[int, bounds(minimum=1, maximum=MAX_ANSWERS)] = 1
    max_answer_len: Annotated[int, bounds(minimum=1, maximum=MAX_ANSWER_TOKENS)] = 15  # tokens
    # Tokens of a window, question included.
    max_seq_len: Annotated[int | None, bounds(minimum=2)] = None
    # Tokens of the context by which neighbouring windows overlap.
    doc_stride: Annotated[int | None, bounds(minimum=0)] = None
    # Tokens; longer questions are truncated; default: no limit.
    max_question_len: Annotated[int | None, bounds(minimum=1)] = None
    handle_impossible_answer: bool = False  # allow the empty answer
    align_to_words: bool = True  # widen answers to whole words


class QuestionAnsweringRequest(RequestModel):
    model_config = ConfigDict(
        json_schema_extra=examples(
            {"inputs": {"question": "Where is it?", "context": "It is in Rome."}},
            {
                "inputs": {"question": "Where is it?", "context": "It is in Rome."},
                "parameters": {"top_k": 3, "handle_impossible_answer": True},
            },
        )
    )

    inputs: QuestionAndContext
    parameters: QuestionAnsweringParameters = Field(default_factory=QuestionAnsweringParameters)


class Answer(BaseModel):
    answer: str
    start: int  # characters of the context
    end: int
    score: float  # probability


class QuestionAnsweringService:
    """Answers concurrent requests together, batching the windows of their contexts.

    Args:
        batching: its rows are windows.
        window, stride: defaults in tokens, preferably those of training.
    """

    def __init__(
        self,
        model: GPTJForQuestionAnswering,
        tokenizer: GPTJTokenizer,
        batching: Batching,
        recorder: Recorder | None = None,
        *,
        window: int = DEFAULT_WINDOW,
        stride: int = DEFAULT_STRIDE,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._window = min(window, model.config.n_positions)
        self._stride = stride
        self._max_windows = min(MAX_WINDOWS, batching.max_queued)
        self._rows: BatchedRows[tuple[Tensor, Tensor]] = BatchedRows(
            "question-answering", model, self._logits, batching, recorder, last_only=False
        )

    async def answer(self, request: QuestionAnsweringRequest) -> Answer | list[Answer]:
        """The most likely span of the context, or a list of spans for top_k above 1.

        Raises InvalidRequestError, QueueFullError, ClosedError or ModelError.
        """
        # Long texts take a while: not on the event loop.
        inputs = request.inputs
        characters = len(inputs.question) + len(inputs.context)
        parts = await in_text_thread(characters, self._windows, request)
        await reserve_tokens(sum(len(part.input_ids) for part in parts))
        logits = await self._rows.results([part.input_ids for part in parts])
        numbers = sum(start.numel() + end.numel() for start, end in logits)
        answers = await in_reply_thread(numbers, _answers, request, parts, logits)
        return answers if request.parameters.top_k > 1 else answers[0]

    def alive(self, within_seconds: float) -> bool:
        return self._rows.alive(within_seconds)

    def close(self) -> None:
        self._rows.close()

    def _windows(self, request: QuestionAnsweringRequest) -> list[Window]:
        parameters = request.parameters
        context = self._model.config.n_positions
        length = self._window if parameters.max_seq_len is None else parameters.max_seq_len
        _check("top_k", parameters.top_k, 1, MAX_ANSWERS)
        _check("max_answer_len", parameters.max_answer_len, 1, MAX_ANSWER_TOKENS)
        _check("max_seq_len", length, 2, context)
        text = self._question(request)
        question = len(self._tokenizer.encode(text))
        room = length - question
        if room < 1:
            raise InvalidRequestError(
                f"the question has {question} tokens, which leaves no room for the context in a "
                f"window of {length}: shorten it"
                + (f", or raise max_seq_len (at most {context})" if length < context else ""),
                param="inputs.question",
                code="context_length_exceeded",
            )
        # A long question leaves little room for the context: windows overlap by at most half.
        stride = (
            min(self._stride, room // 2) if parameters.doc_stride is None else parameters.doc_stride
        )
        _check("doc_stride", stride, 0, room - 1)
        self._check_windows(request.inputs.context, room, stride)
        found = windows(self._tokenizer, text, request.inputs.context, length, stride)
        self._rows.checked([part.input_ids for part in found])
        return found

    def _question(self, request: QuestionAnsweringRequest) -> str:
        """The question, stripped and truncated to max_question_len."""
        limit = request.parameters.max_question_len
        question = request.inputs.question.strip()
        if limit is None:
            return question
        _check("max_question_len", limit, 1, self._model.config.n_positions)
        encoded = self._tokenizer(question, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"][:limit]]
        return question[: ends[-1]].rstrip()

    def _check_windows(self, text: str, room: int, stride: int) -> None:
        """InvalidRequestError if there would be too many windows."""
        tokens = len(self._tokenizer.encode(text))
        count = 1 + max(0, -(-(tokens - room) // (room - stride)))
        if count > self._max_windows:
            raise InvalidRequestError(
                f"the context's {tokens} tokens make {count} windows of {room} with a stride of "
                f"{stride}, more than {self._max_windows}: shorten it, or lower doc_stride",
                param="inputs.context",
                code="context_length_exceeded",
            )

    def _logits(self, states: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Start and end logits, (L) each, of each row's (L, D), in fp32 on the CPU."""
        head = self._model.qa_outputs
        weight, bias = head.weight.float(), head.bias.float()
        logits = [F.linear(x_LD.float(), weight, bias).cpu() for x_LD in states]
        return [(logits_L2[:, 0], logits_L2[:, 1]) for logits_L2 in logits]


def question_answering_app(
    service: QuestionAnsweringService,
    alive: Callable[[], bool],
    recorder: Recorder | None = None,
    ledger: Ledger | None = None,
    options: HTTPOptions = DEFAULTS,
) -> FastAPI:
    """Routes of a service."""
    app = new_app(
        "GPT-J question answering",
        recorder,
        application="question-answering",
        ledger=ledger,
        options=options,
    )
    add_health(app, alive, "the model makes no progress")

    @app.post("/", responses=errors(429, 500, 503))
    async def answer(request: QuestionAnsweringRequest) -> Answer | list[Answer]:
        """Find the answer to a question in a context; a list of them for `top_k` above 1."""
        return await service.answer(request)

    return app


def _answers(
    request: QuestionAnsweringRequest,
    parts: Sequence[Window],
    logits: Sequence[tuple[Tensor, Tensor]],
) -> list[Answer]:
    if not all(bool(each.isfinite().all()) for pair in logits for each in pair):
        raise ModelError("the model's output is not finite: its weights are damaged")
    parameters, text = request.parameters, request.inputs.context
    spans = best_spans(
        parts,
        [start for start, _ in logits],
        [end for _, end in logits],
        top_k=parameters.top_k,
        max_answer_tokens=parameters.max_answer_len,
        handle_impossible_answer=parameters.handle_impossible_answer,
        words=Words(text) if parameters.align_to_words else None,
    )
    answers = [
        Answer(answer=text[span.start : span.end], start=span.start, end=span.end, score=span.score)
        for span in spans
    ]
    # No token of the context can be an answer: the same reply as Hugging Face's.
    return answers or [Answer(answer="", start=0, end=0, score=0.0)]


def _check(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InvalidRequestError(
            f"{name} must be in [{least}, {most}], got {value}", param=f"parameters.{name}"
        )
