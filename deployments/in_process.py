"""A checkpoint's service in this process: a route and a body in, a reply out; no HTTP, no cluster.

The HTTP services' code checks the bodies, so replies and errors equal theirs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel

from deployments import classification, embeddings, question_answering
from deployments.batched import BatchedService
from deployments.embeddings import Arguments as EmbeddingsArguments
from deployments.generation import Arguments as GenerationArguments
from deployments.generation import new_engine_runner, start_services
from deployments.loading import Arguments, BatchArguments, load
from deployments.question_answering import Arguments as QuestionAnsweringArguments
from gptj.model import (
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
    GPTJPreTrainedModel,
)
from gptj.serving.adapters import served_model
from gptj.serving.app import validated
from gptj.serving.chat.schemas import ChatRequest
from gptj.serving.classification import ClassificationRequest
from gptj.serving.completions.generation_request import GenerationRequest
from gptj.serving.completions.generation_service import GenerationService
from gptj.serving.completions.schemas import CompletionRequest
from gptj.serving.embeddings import EmbeddingsRequest
from gptj.serving.errors import InvalidRequestError, NotFoundError
from gptj.serving.metrics import NoRecorder
from gptj.serving.question_answering import QuestionAnsweringRequest
from gptj.serving.requests import RequestModel, ignoring_unknown_fields

ServiceName = Literal["generation", "classification", "question-answering", "embeddings"]

COMPLETIONS, CHATS, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
CLASSIFICATION, ANSWERS = "/classification", "/question-answering"

# Model heads by service; embeddings work with any head's model.
HEADS: Mapping[ServiceName, type[GPTJPreTrainedModel]] = {
    "generation": GPTJForCausalLM,
    "classification": GPTJForSequenceClassification,
    "question-answering": GPTJForQuestionAnswering,
    "embeddings": GPTJModel,
}
# The types of the applications' `args`.
ARGUMENTS: Mapping[ServiceName, type[Arguments]] = {
    "generation": GenerationArguments,
    "classification": BatchArguments,
    "question-answering": QuestionAnsweringArguments,
    "embeddings": EmbeddingsArguments,
}


BODIES: Mapping[str, type[RequestModel]] = {  # of each route's requests
    COMPLETIONS: CompletionRequest,
    CHATS: ChatRequest,
    EMBEDDINGS: EmbeddingsRequest,
    CLASSIFICATION: ClassificationRequest,
    ANSWERS: QuestionAnsweringRequest,
}

Answer = Callable[[Any], Awaitable[Any]]  # a request: the reply


class InProcessService:
    """One of the services; close it at the end.

    Args:
        alive: whether the model makes progress, as in the services' health checks.
        closing: called in order.
    """

    def __init__(
        self,
        routes: Mapping[str, Answer],
        alive: Callable[[float], bool],
        closing: Sequence[Callable[[], None]],
        *,
        rows_at_once: int,
        ignore_unknown_fields: bool,
    ) -> None:
        self.routes = routes
        self.alive = alive
        self._closing = closing
        self.rows_at_once = rows_at_once  # in one step of the model
        self._ignore_unknown_fields = ignore_unknown_fields  # of bodies

    @classmethod
    def load(
        cls, name: ServiceName, arguments: Arguments, device: torch.device | None = None
    ) -> Self:
        """The service of a checkpoint, from the application's `args`.

        Args:
            device: None: a GPU, if this process sees one.

        Raises:
            FileNotFoundError, CheckpointError, ValueError: if something cannot be loaded.
        """
        if isinstance(arguments, GenerationArguments):
            return cls._generation(arguments, device)
        if isinstance(arguments, QuestionAnsweringArguments):
            answers = question_answering.load_service(arguments, device)
            return cls._batched(ANSWERS, answers.answer, answers, arguments)
        if isinstance(arguments, EmbeddingsArguments):
            vectors = embeddings.load_service(arguments, device)
            return cls._batched(EMBEDDINGS, vectors.embed, vectors, arguments)
        assert name == "classification" and isinstance(arguments, BatchArguments)
        classes = classification.load_service(arguments, device)
        return cls._batched(CLASSIFICATION, classes.classify, classes, arguments)

    async def answer(self, route: str, body: Any) -> Any:
        """The reply to a POST of the body. Cancelling the call cancels the work.

        Raises:
            APIError: with the status and the body that the HTTP service would send.
            QueueFullError, ClosedError: from the model's queue.
        """
        answer = self.routes.get(route)
        if answer is None:
            raise NotFoundError(
                f"no route POST {route!r:.200}: this model answers {' and '.join(self.routes)}",
                code="unknown_url",
            )
        with ignoring_unknown_fields() if self._ignore_unknown_fields else nullcontext():
            request = checked_body(route, body)
        return await answer(request)

    def close(self) -> None:
        for close in self._closing:
            close()

    @classmethod
    def _generation(cls, arguments: GenerationArguments, device: torch.device | None) -> Self:
        model, tokenizer = load(GPTJForCausalLM, arguments, device)
        runner, limits = new_engine_runner(model, arguments)
        services = start_services(model, tokenizer, runner, limits, arguments, NoRecorder())

        def answer(service: GenerationService[Any, Any, Any]) -> Answer:
            async def complete(request: GenerationRequest) -> Any:
                # Once submitted, the engine's requests hold the adapter themselves.
                async with served_model(request.model, arguments.name, services.adapters) as own:
                    return await service.complete(request.served_by(own))

            return complete

        return cls(
            {COMPLETIONS: answer(services.completions), CHATS: answer(services.chats)},
            services.engine.alive,
            (services.close,),
            rows_at_once=limits.max_num_seqs,
            ignore_unknown_fields=arguments.http_options().ignore_unknown_fields,
        )

    @classmethod
    def _batched(
        cls, route: str, answer: Answer, service: BatchedService, arguments: BatchArguments
    ) -> Self:
        return cls(
            {route: answer},
            service.alive,
            (service.close,),
            rows_at_once=arguments.max_batch,
            ignore_unknown_fields=arguments.http_options().ignore_unknown_fields,
        )


def checked_body(route: str, body: Any) -> RequestModel:
    """A body for one of the routes. APIError with the HTTP service's status and message."""
    request = validated(BODIES[route], body)
    if getattr(request, "stream", False):
        raise InvalidRequestError(
            "stream=true needs an HTTP connection: leave it out", param="stream"
        )
    return request


def as_json(reply: Any) -> Any:
    """A reply as plain values."""
    if isinstance(reply, BaseModel):
        return reply.model_dump(mode="json")
    return [as_json(each) for each in reply] if isinstance(reply, list) else reply
