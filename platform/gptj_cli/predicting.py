"""`gptj predict`: a checkpoint and rows in, one JSON object a row out; no cluster.

The services themselves compute it, in this process: answers are those that HTTP would give.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch

from deployments.loading import Arguments, best_dtype, check, training_data_settings
from gptj.config import GPTJConfig, parse_dtype
from gptj.data.examples import groups
from gptj.data.rows import Row
from gptj.data.sources import read_rows
from gptj.engine.backends import best_runner
from gptj.engine.cache_size import DEFAULT_SHARES, CacheShare, room
from gptj.engine.engine import Engine
from gptj.engine.limits import Limits
from gptj.model import (
    HEAD_CLASSES,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJPreTrainedModel,
)
from gptj.serving.classification import ClassificationRequest, ClassificationService
from gptj.serving.completions.schemas import CompletionRequest
from gptj.serving.completions.service import CompletionService
from gptj.serving.completions.vocabulary import Vocabulary
from gptj.serving.errors import APIError
from gptj.serving.metrics import NoRecorder
from gptj.serving.question_answering import (
    DEFAULT_STRIDE,
    DEFAULT_WINDOW,
    QuestionAnsweringRequest,
    QuestionAnsweringService,
)
from gptj.tokenizer import GPTJTokenizer
from jobs.evaluate import head_class

Answer = Callable[[Row], Awaitable[dict[str, Any]]]

# What a head reads of a row: what training reads, without what is to be found.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "GPTJForCausalLM": ("text",),
    "GPTJForSequenceClassification": ("text",),
    "GPTJForQuestionAnswering": ("question", "context"),
}


@dataclass(frozen=True)
class Options:
    batch_size: int = 16  # rows, or windows of them, that are computed together
    columns: Mapping[str, str] = field(default_factory=dict)  # our column name: the file's
    delimiter: str | None = None
    max_tokens: int = 32  # new ones, of a language model
    temperature: float = 0.0  # 0: the likeliest token
    device: str | None = None  # default: cuda where there is one
    dtype: str = "auto"


async def predict(address: str, data: str, options: Options) -> AsyncIterator[dict[str, Any]]:
    """The rows' results in their order, as they are ready.

    A row that the model cannot take gives `{"row": …, "error": …}`.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: for what cannot be loaded or read.
    """
    head = head_class(GPTJConfig.from_pretrained(address), address)
    if unknown := options.columns.keys() - set(COLUMNS[head]):
        raise ValueError(f"a {head} reads {', '.join(COLUMNS[head])}, and no {min(unknown)}")
    rows = read_rows(data, COLUMNS[head], options.columns, delimiter=options.delimiter)
    model, tokenizer = load(address, head, options)
    service, answer = answerer(model, tokenizer, address, options)
    with closing(service):
        async for result in _in_order(rows, answer, 4 * options.batch_size):
            yield result


def load(address: str, head: str, options: Options) -> tuple[GPTJPreTrainedModel, GPTJTokenizer]:
    """As a service loads, on the device that the options say."""
    on_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not on_gpu:
        raise ValueError("--device cuda: this machine has no CUDA device; leave it out")
    device = torch.device(options.device or ("cuda" if on_gpu else "cpu"))
    dtype = best_dtype(device) if options.dtype == "auto" else parse_dtype(options.dtype)
    cls = HEAD_CLASSES[head]
    tokenizer = check(cls, Arguments(checkpoint=address))
    return cls.from_pretrained(address, dtype=dtype, device=device), tokenizer


def answerer(
    model: GPTJPreTrainedModel, tokenizer: GPTJTokenizer, address: str, options: Options
) -> tuple[Any, Answer]:
    """What must be closed at the end, and how a row is answered."""
    waiting = 64 * options.batch_size
    if isinstance(model, GPTJForSequenceClassification):
        classifier = ClassificationService(
            model, tokenizer, max_batch=options.batch_size, max_queued=waiting
        )

        async def classified(row: Row) -> dict[str, Any]:
            text = row.text("text")
            (labels,) = await classifier.classify(ClassificationRequest(inputs=[text]))
            return {"text": text, "labels": [label.model_dump() for label in labels]}

        return classifier, classified
    if isinstance(model, GPTJForQuestionAnswering):
        trained = training_data_settings(Arguments(checkpoint=address))
        reader = QuestionAnsweringService(
            model,
            tokenizer,
            window=trained.get("sequence_length", DEFAULT_WINDOW),
            stride=trained.get("stride", DEFAULT_STRIDE),
            max_batch=options.batch_size,
            max_queued=max(256, waiting),
        )

        async def answered(row: Row) -> dict[str, Any]:
            inputs = {name: row.text(name) for name in ("question", "context")}
            answer = await reader.answer(QuestionAnsweringRequest(inputs=inputs))
            assert not isinstance(answer, list)
            return {"question": inputs["question"], **answer.model_dump()}

        return reader, answered
    assert isinstance(model, GPTJForCausalLM)
    engine = _engine(model, tokenizer, options)
    vocabulary = Vocabulary.of(tokenizer, model.config.vocab_size)
    writer = CompletionService(engine, tokenizer, vocabulary, address, NoRecorder())

    async def continued(row: Row) -> dict[str, Any]:
        text = row.text("text")
        request = CompletionRequest(
            prompt=[text], max_tokens=options.max_tokens, temperature=options.temperature
        )
        (choice,) = (await writer.complete(request)).choices
        return {"text": text, "completion": choice.text, "finish_reason": choice.finish_reason}

    return engine, continued


def _engine(model: GPTJForCausalLM, tokenizer: GPTJTokenizer, options: Options) -> Engine:
    share = DEFAULT_SHARES[model.device.type]
    tokens = room(model.config, model.device, share, model.dtype.itemsize)
    limits = Limits.of(
        model.device, tokens, model.config.n_positions, max_num_seqs=options.batch_size
    )
    eos = model.config.eos_token_id
    vocabulary = Vocabulary.of(tokenizer, model.config.vocab_size)
    return Engine(
        best_runner(model, CacheShare(share, limits), release=True),
        eos_ids=[] if eos is None else [eos] if isinstance(eos, int) else eos,
        banned_ids=vocabulary.unused_ids,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
    )


async def _in_order(
    rows: Iterable[Row], answer: Answer, at_once: int
) -> AsyncIterator[dict[str, Any]]:
    async def numbered(number: int, row: Row) -> dict[str, Any]:
        try:
            return {"row": number, **await answer(row)}
        except (APIError, ValueError) as error:
            return {"row": number, "error": str(error)}

    number = 0
    for group in groups(rows, at_once):
        tasks = [numbered(number + place, row) for place, row in enumerate(group, 1)]
        for result in await asyncio.gather(*tasks):
            yield result
        number += len(group)
