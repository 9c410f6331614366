"""Tiny models, and the services in front of them in this process: no Ray, real HTTP."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from http_server import listening
from starlette.types import ASGIApp, Receive, Scope, Send

from gptj import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJTokenizer,
)
from gptj.adapters.base import Base
from gptj.chat import template_of
from gptj.engine.adapter_slots import AdapterSlots
from gptj.engine.constraints.compiler import GrammarCompiler
from gptj.engine.engine import Engine
from gptj.engine.runners.lora import LoRALimits
from gptj.engine.runners.torch_runner import TorchRunner
from gptj.engine.speculation import Speculation
from gptj.serving.adapters import Adapters
from gptj.serving.batched_rows import Batching
from gptj.serving.chat.service import ChatService
from gptj.serving.classification import ClassificationService, classification_app
from gptj.serving.completions.schemas import ModelCard
from gptj.serving.completions.service import CompletionService
from gptj.serving.completions.vocabulary import Vocabulary
from gptj.serving.embeddings import EmbeddingsService, embeddings_app
from gptj.serving.generation import generation_app
from gptj.serving.metrics import NoRecorder
from gptj.serving.question_answering import QuestionAnsweringService, question_answering_app

SENTENCES = [
    "The tower stands in Paris, and the river runs past it.",
    "A café opens at nine; naïve tourists wait — 東京 is far away. 😀",
    "Who wrote the book? Anna wrote the book in the year 1907.",
]
PROMPTS = ["The tower", "A café opens", "Who wrote the book?", "x", "東京 is far away. 😀 Anna"]
CONTEXT = 2048  # tokens
SHORT_CONTEXT = 64  # of the other two
UNUSED = 20  # rows of the embedding that stand for no text
KEY = "a-key-of-the-test"
KEYS = f"another, {KEY}"
NUM_PAGES = 1024
# With roles that tokens of the tests' vocabulary spell, and a stop string of its own.
TEMPLATE = (
    "{% set stop = ['\\n>'] %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' and loop.nextitem and loop.nextitem.role == 'user' %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "> {{ message.role }}{{ ' ' + message.name if message.name }}: {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}> assistant:{% endif %}"
)


@dataclass(frozen=True)
class Models:
    """What is behind the services, to compare their replies with."""

    tokenizer: GPTJTokenizer
    generation: GPTJForCausalLM
    classification: GPTJForSequenceClassification
    question_answering: GPTJForQuestionAnswering

    def with_unused_ids(self) -> GPTJForCausalLM:
        """The language model to be served: without a ban, every output is of unused ids."""
        model = copy.deepcopy(self.generation)
        with torch.no_grad():
            model.lm_head.bias[len(self.tokenizer) :] = 100.0
        return model


def make_models(
    context: int = CONTEXT, texts: Sequence[str] = SENTENCES, vocab_size: int = 300
) -> Models:
    """Random ones, with a vocabulary of the texts; `context` is the language model's, in tokens."""
    tokenizer = GPTJTokenizer.train(texts, vocab_size)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer) + UNUSED,
        "n_positions": SHORT_CONTEXT,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.3,  # wide, so that probabilities differ
    }
    labels = {0: "negative", 1: "neutral", 2: "positive"}
    models = Models(
        tokenizer,
        GPTJForCausalLM(GPTJConfig(**{**shape, "n_positions": context})).eval(),
        GPTJForSequenceClassification(GPTJConfig(**shape, id2label=labels)).eval(),
        GPTJForQuestionAnswering(GPTJConfig(**shape)).eval(),
    )
    with torch.no_grad():
        models.generation.lm_head.bias[len(tokenizer) :] = -torch.inf
    return models


@contextmanager
def served_in_process(models: Models) -> Iterator[str]:
    """The address of the services, one with speculation and one behind a key (/guarded)."""
    with ExitStack() as stack:
        apps: dict[str, ASGIApp] = {**stack.enter_context(applications(models))}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GPTJ_API_KEYS", KEYS)
            guarded = _generation(
                models, "org/guarded", max_num_seqs=1, max_queued=1, template=None
            )
            apps["/guarded"] = stack.enter_context(guarded)
        drafting = _generation(models, "org/drafting", speculation=Speculation())
        apps["/drafting"] = stack.enter_context(drafting)
        yield stack.enter_context(listening(mounted(apps)))


@contextmanager
def applications(models: Models) -> Iterator[dict[str, FastAPI]]:
    """All of them by their prefixes."""
    with ExitStack() as stack:
        yield {
            "/": stack.enter_context(_generation(models, "generation")),
            "/classification": stack.enter_context(_classification(models)),
            "/question-answering": stack.enter_context(_question_answering(models)),
            "/v1/embeddings": stack.enter_context(_embeddings(models)),
        }


def mounted(apps: Mapping[str, ASGIApp]) -> ASGIApp:
    """Applications under their prefixes, as Serve calls them: with the whole path."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "/")
        prefix = max(
            (each for each in apps if f"{path}/".startswith(each.rstrip("/") + "/")),
            key=len,
        )
        await apps[prefix]({**scope, "root_path": prefix.rstrip("/")}, receive, send)

    return call


@contextmanager
def _generation(
    models: Models,
    name: str,
    max_num_seqs: int = 64,
    max_queued: int = 256,
    template: str | None = TEMPLATE,
    speculation: Speculation | None = None,
    max_loras: int = 3,
    **adapters: Any,  # named, root
) -> Iterator[FastAPI]:
    tokenizer = models.tokenizer
    runner = TorchRunner(models.with_unused_ids(), NUM_PAGES)
    vocabulary = Vocabulary.of(tokenizer, runner.config.vocab_size)
    assert tokenizer.eos_token_id is not None
    engine = Engine(
        runner,
        eos_ids=[tokenizer.eos_token_id],
        banned_ids=vocabulary.unused_ids,
        max_num_seqs=max_num_seqs,
        max_queued=max_queued,
        speculation=speculation,
    )
    slots = AdapterSlots(runner, LoRALimits(max_loras))
    recorder = adapters.pop("recorder", NoRecorder())
    base = adapters.pop("base", Base("in-process"))
    served = Adapters(slots, runner.config, base, tokenizer, recorder, **adapters)
    grammars = GrammarCompiler(tokenizer, engine.vocab_size, engine.eos_ids)
    parts = (engine, tokenizer, vocabulary, name, recorder, grammars)
    completions = CompletionService(*parts)
    chats = ChatService(*parts, template_of(tokenizer, template))
    context = runner.config.n_positions
    card = ModelCard(
        id=name,
        created=int(time.time()),
        root="in-process",
        max_model_len=context,
        chat_template=template is not None,
    )
    try:
        yield generation_app(
            completions,
            chats,
            tokenizer,
            card,
            lambda: engine.alive(120),
            recorder,
            adapters=served,
        )
    finally:
        served.close()
        grammars.close()
        engine.close()


@contextmanager
def served_with_adapters(models: Models, **settings: Any) -> Iterator[str]:
    """The address of the generation service with adapters: see Adapters."""
    with ExitStack() as stack:
        app = stack.enter_context(_generation(models, "base", **settings))
        yield stack.enter_context(listening(app))


@contextmanager
def _classification(models: Models) -> Iterator[FastAPI]:
    service = ClassificationService(
        models.classification, models.tokenizer, Batching(max_batch=16, max_queued=256)
    )
    try:
        yield classification_app(service, lambda: service.alive(120))
    finally:
        service.close()


@contextmanager
def _question_answering(models: Models) -> Iterator[FastAPI]:
    service = QuestionAnsweringService(
        models.question_answering, models.tokenizer, Batching(max_batch=16, max_queued=256)
    )
    try:
        yield question_answering_app(service, lambda: service.alive(120))
    finally:
        service.close()


@contextmanager
def _embeddings(models: Models) -> Iterator[FastAPI]:
    service = EmbeddingsService(
        models.generation.transformer, models.tokenizer, "embedder", Batching(16, 256)
    )
    try:
        yield embeddings_app(service, lambda: service.alive(120))
    finally:
        service.close()
