"""`gptj predict`: a checkpoint and rows in, one JSON object per row out; no cluster.

The services' own code runs in this process, so answers equal those over HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from deployments.generation import Arguments as GenerationArguments
from deployments.generation import new_engine_runner
from deployments.loading import Arguments, load_from, open_checkpoint
from gptj.config import GPTJConfig
from gptj.data.examples import groups
from gptj.data.rows import Row
from gptj.data.sources import read_rows
from gptj.engine.constraints.compiler import GrammarCompiler
from gptj.engine.engine import Engine
from gptj.model import (
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
    QuestionAndContext,
    QuestionAnsweringRequest,
    QuestionAnsweringService,
)
from gptj.tokenizer import GPTJTokenizer
from jobs.evaluate import task_of

NAME = "model"  # of the only model
Answer = Callable[[Row], Awaitable[dict[str, Any]]]

# The columns each head reads: training's, without the labels.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "GPTJForCausalLM": ("text",),
    "GPTJForSequenceClassification": ("text",),
    "GPTJForQuestionAnswering": ("question", "context"),
}


@dataclass(frozen=True)
class Options:
    batch_size: int = 16  # rows, or windows of rows, computed together
    columns: Mapping[str, str] = field(default_factory=dict)  # our column name: the file's
    delimiter: str | None = None
    max_tokens: int = 32  # most new tokens (language models)
    temperature: float = 0.0  # 0: greedy
    device: str | None = None  # default: cuda if available
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"


async def predict(address: str, data: str, options: Options) -> AsyncIterator[dict[str, Any]]:
    """The rows' results, in order, as they become ready.

    A row the model cannot handle gives `{"row": …, "error": …}`.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: if something cannot be loaded or read.
    """
    task = task_of(GPTJConfig.from_pretrained(address), address)
    head = task.head.__name__
    if unknown := options.columns.keys() - set(COLUMNS[head]):
        raise ValueError(f"a {head} reads {', '.join(COLUMNS[head])}, not {min(unknown)}")
    rows = read_rows(data, COLUMNS[head], options.columns, delimiter=options.delimiter)
    arguments = Arguments(checkpoint=address, dtype=options.dtype)
    with open_checkpoint(arguments) as folder:
        model, tokenizer = load_from(folder, task.head, arguments, device_of(options))
        trained = folder.read_training_data()
    service, answer = answerer(model, tokenizer, trained, options)
    with closing(service):
        async for result in _in_order(rows, answer, 4 * options.batch_size):
            yield result


def device_of(options: Options) -> torch.device:
    """The device to use. ValueError if the requested GPU does not exist."""
    on_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not on_gpu:
        raise ValueError("--device cuda: this machine has no CUDA device; leave it out")
    return torch.device(options.device or ("cuda" if on_gpu else "cpu"))


def answerer(
    model: GPTJPreTrainedModel,
    tokenizer: GPTJTokenizer,
    trained: Mapping[str, Any],
    options: Options,
) -> tuple[Any, Answer]:
    """A resource to close at the end, and a function that answers a row.

    Args:
        trained: the `data` settings of the model's training, as far as known.
    """
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
            answer = await reader.answer(
                QuestionAnsweringRequest(inputs=QuestionAndContext(**inputs))
            )
            assert not isinstance(answer, list)
            return {"question": inputs["question"], **answer.model_dump()}

        return reader, answered
    assert isinstance(model, GPTJForCausalLM)
    vocabulary = Vocabulary.of(tokenizer, model.config.vocab_size)
    engine = _engine(model, vocabulary, options)
    grammars = GrammarCompiler(tokenizer, engine.vocab_size, engine.eos_ids)
    writer = CompletionService(engine, tokenizer, vocabulary, NAME, NoRecorder(), grammars)

    async def continued(row: Row) -> dict[str, Any]:
        text = row.text("text")
        request = CompletionRequest(
            prompt=[text], max_tokens=options.max_tokens, temperature=options.temperature
        )
        (choice,) = (await writer.complete(request)).choices
        return {"text": text, "completion": choice.text, "finish_reason": choice.finish_reason}

    return engine, continued


def _engine(model: GPTJForCausalLM, vocabulary: Vocabulary, options: Options) -> Engine:
    arguments = GenerationArguments(checkpoint=NAME, max_num_seqs=options.batch_size)
    runner, limits = new_engine_runner(model, arguments)
    eos = model.config.eos_token_id
    return Engine(
        runner,
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
