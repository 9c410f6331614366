"""Hugging Face Inference's text classification: texts in, labels with scores out.

{"inputs": "A fine film", "parameters": {"top_k": 1, "function_to_apply": "softmax"}}
-> [[{"label": "positive", "score": 0.98}]]

An input may also be a pair of texts, `{"text": "It rains", "text_pair": "The ground is wet"}`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from torch import Tensor

from gptj.model import GPTJForSequenceClassification
from gptj.serving.app import DEFAULTS, HTTPOptions, add_health, new_app
from gptj.serving.batched_rows import BatchedRows, Batching
from gptj.serving.completions.vocabulary import Vocabulary
from gptj.serving.errors import InvalidRequestError, ModelError, check_length
from gptj.serving.keys.account import reserve_tokens
from gptj.serving.keys.ledger import Ledger
from gptj.serving.metrics import Recorder
from gptj.serving.openapi import errors
from gptj.serving.requests import (
    ONLY_NULL,
    RequestModel,
    bounds,
    checked_text,
    examples,
    given_fields,
)
from gptj.serving.text_threads import in_text_thread
from gptj.tokenizer import GPTJTokenizer

MAX_INPUTS = 256
TEXT = {"type": "string", "minLength": 1}
INPUT = {
    "anyOf": [
        TEXT,
        {
            "type": "object",
            "properties": {"text": TEXT, "text_pair": {"anyOf": [TEXT, {"type": "null"}]}},
            "required": ["text"],
            "additionalProperties": ONLY_NULL,
        },
    ]
}

Function = Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True)
class Input:
    text: str
    text_pair: str | None = None  # appended to the text without a separator

    @property
    def characters(self) -> int:
        return len(self.text) + len(self.text_pair or "")


def as_inputs(value: Any) -> list[Input]:
    """One or several texts, or pairs of texts, as a list. Raises ValueError for anything else."""
    inputs = value if isinstance(value, list) else [value]
    if not inputs:
        raise ValueError("must not be an empty list")
    return [_as_input(each) for each in inputs]


def _as_input(value: Any) -> Input:
    if isinstance(value, str):
        return Input(checked_text(value))
    if isinstance(value, dict):
        given = given_fields(value, ("text", "text_pair"))
        texts = {name: checked_text(each) for name, each in given.items() if isinstance(each, str)}
        if texts.keys() == given.keys() and {"text"} <= texts.keys() <= {"text", "text_pair"}:
            return Input(**texts)
    raise ValueError('must be a string, {"text": …, "text_pair": …}, or a list of these')


class ClassificationParameters(RequestModel):
    # Only the k most likely labels; default: all.
    top_k: Annotated[int | None, bounds(minimum=1)] = None
    function_to_apply: Function | None = None  # to the logits; default: by the problem type
    # Truncate to the context, a pair's longer text first; otherwise too long inputs are errors.
    truncation: bool = False


class ClassificationRequest(RequestModel):
    model_config = ConfigDict(
        json_schema_extra=examples(
            {"inputs": "A fine film", "parameters": {"top_k": 1, "function_to_apply": "softmax"}},
            {"inputs": ["A fine film", "A dull one"]},
            {"inputs": {"text": "It rains", "text_pair": "The ground is wet"}},
        )
    )

    inputs: Annotated[
        list[Input],
        PlainValidator(as_inputs),
        WithJsonSchema(
            {
                "anyOf": [
                    *INPUT["anyOf"],
                    {"type": "array", "items": INPUT, "minItems": 1, "maxItems": MAX_INPUTS},
                ]
            }
        ),
    ]
    parameters: ClassificationParameters = Field(default_factory=ClassificationParameters)


class LabelScore(BaseModel):
    label: str
    score: float


class ClassificationService:
    """Classifies the texts of concurrent requests together."""

    def __init__(
        self,
        model: GPTJForSequenceClassification,
        tokenizer: GPTJTokenizer,
        batching: Batching,
        recorder: Recorder | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary.of(tokenizer, model.config.vocab_size)
        self._max_inputs = min(MAX_INPUTS, batching.max_queued)
        self._rows: BatchedRows[Tensor] = BatchedRows(
            "classification", model, self._logits, batching, recorder, last_only=True
        )

    async def classify(self, request: ClassificationRequest) -> list[list[LabelScore]]:
        """Each text's labels, most likely first. Cancelling the call withdraws waiting texts.

        Raises InvalidRequestError, QueueFullError, ClosedError or ModelError.
        """
        top_k = request.parameters.top_k
        if top_k is not None and top_k < 1:
            raise InvalidRequestError(
                f"top_k must be 1 or more, got {top_k}", param="parameters.top_k"
            )
        if len(request.inputs) > self._max_inputs:
            raise InvalidRequestError(
                f"inputs may have {self._max_inputs} texts, got {len(request.inputs)}: send "
                f"several requests",
                param="inputs",
            )
        # Long texts take a while: not on the event loop.
        ids = await in_text_thread(
            sum(each.characters for each in request.inputs),
            self._encode,
            request.inputs,
            request.parameters.truncation,
        )
        await reserve_tokens(sum(map(len, ids)))
        logits = await self._rows.results(ids)
        function = request.parameters.function_to_apply or self._function()
        return [self._labels(row, function, top_k) for row in logits]

    def alive(self, within_seconds: float) -> bool:
        return self._rows.alive(within_seconds)

    def close(self) -> None:
        self._rows.close()

    def _encode(self, inputs: Sequence[Input], truncation: bool) -> Sequence[list[int]]:
        rows: list[list[int]] = []
        for number, each in enumerate(inputs):
            which = f"inputs[{number}]" if len(inputs) > 1 else "inputs"
            texts = [each.text] if each.text_pair is None else [each.text, each.text_pair]
            if not all(texts):
                raise InvalidRequestError(f"{which} is empty", param=which)
            if not truncation:
                least = sum(map(self._vocabulary.least_tokens, texts))
                self._check_length(which, "at least ", least)
            rows.append(
                self._tokenizer(
                    each.text,
                    each.text_pair,
                    truncation=truncation,
                    max_length=self._model.config.n_positions,
                )["input_ids"]
            )
            self._check_length(which, "", len(rows[-1]))
        return self._rows.checked(rows)

    def _check_length(self, which: str, known: str, length: int) -> None:
        remedy = "shorten the text, or set parameters.truncation"
        check_length(which, known, length, self._model.config.n_positions, remedy)

    def _logits(self, states: list[Tensor]) -> list[Tensor]:
        """(C) of each row, in fp32 on the CPU, from its last token's (1, D)."""
        logits_BC = F.linear(torch.cat(states).float(), self._model.score.weight.float())
        return list(logits_BC.cpu())

    def _function(self) -> Function:
        """Hugging Face's default."""
        config = self._model.config
        if config.problem_type == "regression":
            return "none"
        if config.problem_type == "multi_label_classification" or config.num_labels == 1:
            return "sigmoid"
        return "softmax"

    def _labels(self, logits: Tensor, function: Function, top_k: int | None) -> list[LabelScore]:
        if not bool(logits.isfinite().all()):
            raise ModelError(
                f"the model's output is not finite: its weights are damaged, or too large for "
                f"{self._model.dtype}"
            )
        if function == "softmax":
            scores = logits.softmax(dim=-1)
        else:
            scores = logits.sigmoid() if function == "sigmoid" else logits
        best = scores.sort(descending=True, stable=True)
        names = self._model.config.id2label
        return [
            LabelScore(label=names[number], score=score)
            for number, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ][:top_k]


def classification_app(
    service: ClassificationService,
    alive: Callable[[], bool],
    recorder: Recorder | None = None,
    ledger: Ledger | None = None,
    options: HTTPOptions = DEFAULTS,
) -> FastAPI:
    """Routes of a service."""
    app = new_app(
        "GPT-J text classification",
        recorder,
        application="classification",
        ledger=ledger,
        options=options,
    )
    add_health(app, alive, "the model makes no progress")

    @app.post("/", responses=errors(429, 500, 503))
    async def classify(request: ClassificationRequest) -> list[list[LabelScore]]:
        """Classify one text or several."""
        return await service.classify(request)

    return app
